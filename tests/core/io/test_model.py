"""Random reads and writes against a plain file model, on both backends, direct and buffered."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ds_core import arena
from ds_core.io import Engine, IoError

SIZE = 300_000
DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128, torch.bool)


def random_tensor(rng: random.Random, num_bytes: int) -> Tensor:
    """A tensor of any dtype whose memory begins anywhere; of `num_bytes` rounded down to whole elements."""
    dtype = rng.choice(DTYPES)
    numel = num_bytes // dtype.itemsize
    shift = rng.choice([0, 0, 1, rng.randrange(64)])
    make = rng.choice([arena.empty, torch.empty])
    tensor: Tensor = make((numel + shift) * dtype.itemsize, dtype=torch.uint8)
    tensor.random_(0, 2 if dtype == torch.bool else 256)
    return tensor.view(dtype)[shift:]


def disjoint_ranges(rng: random.Random, limit: int, count: int) -> list[tuple[int, int]]:
    """(offset, bytes) of ranges that touch at most, some of them at multiples of pages."""
    cuts = sorted({rng.choice([1, 512, 4096]) * rng.randrange(limit) % limit for _ in range(2 * count)})
    return [(begin, end - begin) for begin, end in pairwise(cuts)]


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("seed", range(6))
def test_concurrent_operations_on_disjoint_ranges(
    backend: str, direct: bool, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    model = bytearray(SIZE)
    block_bytes = rng.choice([1, 4096, 10_000, 65_536, 1 << 20])
    with Engine(
        backend=backend,  # type: ignore[arg-type]
        block_bytes=block_bytes,
        queue_depth=rng.choice([1, 3, 32]),
        num_threads=rng.choice([0, 1, 3]),
        direct=direct,
    ) as engine:
        file = engine.open(tmp_path / "data", create=True, num_bytes=SIZE)
        assert file.direct == direct
        assert bool(file.reason) != direct
        for _ in range(6):
            works = []
            for offset, num_bytes in disjoint_ranges(rng, SIZE, 20):
                tensor = random_tensor(rng, num_bytes)
                content = bytes_of(tensor)
                model[offset : offset + len(content)] = content
                works.append(file.write(tensor, offset))
            for work in works:
                work.wait()
            reads = []
            for offset, num_bytes in disjoint_ranges(rng, SIZE, 10):
                tensor = random_tensor(rng, num_bytes)
                reads.append((file.read(tensor, offset), tensor, offset))
            for work, tensor, offset in reads:
                work.wait()
                assert work.done()
                content = bytes_of(tensor)
                assert content == model[offset : offset + len(content)]
        assert file.num_bytes == SIZE
        file.close()
    assert (tmp_path / "data").read_bytes() == model


def test_a_file_grows_and_holes_are_zero(engine: Engine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "data", create=True)
    assert file.num_bytes == 0
    parts = [torch.full((5_000,), value, dtype=torch.uint8) for value in range(1, 4)]
    for k, part in enumerate(parts):
        file.write(part, k * 5_000).wait()  # appended
    file.write(parts[0], 100_001).wait()  # leaves a hole
    assert file.num_bytes == 105_001
    whole = torch.empty(105_001, dtype=torch.uint8)
    file.read(whole).wait()
    assert torch.equal(whole[:15_000], torch.cat(parts))
    assert whole[15_000:100_001].count_nonzero() == 0
    assert torch.equal(whole[100_001:], parts[0])


def test_an_existing_file_is_kept_emptied_or_refused(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abcdef")
    with engine.open(path, num_bytes=6) as file:
        out = torch.empty(3, dtype=torch.uint8)
        file.read(out, 2).wait()
        assert bytes_of(out) == b"cde"
    with pytest.raises(IoError, match=r"Remove the file.*data"):
        engine.open(path, create=True, exclusive=True)
    assert path.read_bytes() == b"abcdef"
    with engine.open(path, create=True, num_bytes=10_000) as file:
        assert file.num_bytes == 10_000
    assert path.read_bytes() == bytes(10_000)
    with engine.open(path) as file:
        file.close(unlink=True)
    assert not path.exists()


def test_empty_tensors_and_a_gradient_tracking_one(engine: Engine, tmp_path: Path) -> None:
    file = engine.open(tmp_path / "data", create=True)
    file.write(torch.empty(0)).wait()
    file.read(torch.empty(0), 77).wait()
    parameter = torch.nn.Parameter(torch.randn(100))
    file.write(parameter).wait()
    copy = torch.empty(100)
    version = copy._version
    file.read(copy).wait()
    assert torch.equal(copy, parameter)
    assert copy._version > version


def test_more_operations_than_the_queue_holds(backend: str, tmp_path: Path) -> None:
    with Engine(backend=backend, queue_depth=2, block_bytes=4096) as engine:  # type: ignore[arg-type]
        file = engine.open(tmp_path / "data", create=True, num_bytes=500 * 1000)
        parts = [torch.full((1000,), k % 251, dtype=torch.uint8) for k in range(500)]
        works = [file.write(part, 1000 * k) for k, part in enumerate(parts)]
        for work in reversed(works):
            work.wait()
        outs = [torch.empty(1000, dtype=torch.uint8) for _ in parts]
        works = [file.read(out, 1000 * k) for k, out in enumerate(outs)]
        for work in works:
            work.wait()
        assert all(torch.equal(a, b) for a, b in zip(parts, outs, strict=True))


def test_registered_tensors_give_the_same_bytes(backend: str, tmp_path: Path) -> None:
    with Engine(backend=backend, block_bytes=65_536) as engine:  # type: ignore[arg-type]
        source, out = arena.empty(3 << 20, torch.uint8), arena.zeros(3 << 20, torch.uint8)
        source.random_(0, 256)
        reasons = [engine.register(source), engine.register(out)]
        if backend == "threads":
            assert reasons == ["only io_uring registers memory"] * 2
        file = engine.open(tmp_path / "data", create=True, num_bytes=source.nbytes)
        file.write(source[4096:], 4096).wait()
        file.write(source[:4096]).wait()
        file.read(out).wait()
        assert torch.equal(source, out)
        out.zero_()
        work = file.read(out)
        engine.unregister(out)
        work.wait()
        file.read(out).wait()
        assert torch.equal(source, out)
