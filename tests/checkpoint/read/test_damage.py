"""One byte of a checkpoint changed at a time: loading says so, with the file and, inside the data, the tensor.

Every byte of the checkpoint of a small engine on two ranks, and 1000 of a larger one, with the marker `full`; by
default a sample, and every byte of `latest`. (test_checkpoint_format.py changes every byte of a tiny one.)
"""

from __future__ import annotations

import json
import os
import random
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_checkpoint as checkpoint
from ds_checkpoint import Checkpoint, CheckpointError
from ds_checkpoint.format.manifest import NAME
from ds_checkpoint.write import Content, write
from engine import jobs
from harness import ranks


@dataclass(frozen=True)
class Record:
    fqn: str
    data: Tensor
    state: str = "param"
    flat_offset: int = 0
    coordinates: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def global_shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


def problems(path: Path) -> str:
    """What opening and reading everything says."""
    try:
        with Checkpoint(path) as opened:
            opened.check_files()
            for fqn, state, entry in opened.manifest.entries():
                opened.read(fqn, state, 0, torch.empty(entry.numel, dtype=entry.dtype), entry.coordinates)
            for name in opened.manifest.blobs:
                opened.blob(name)
            return "; ".join(opened.problems)
    except CheckpointError as error:
        return str(error)


def owners(file: Path) -> list[tuple[int, int, str]]:
    """(first byte, byte after the last, name as errors have it) of the tensors in a data file."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found = []
    for key, entry in json.loads(raw[8 : 8 + length]).items():
        if key != "__metadata__":
            name, _, rest = key.rpartition("/")
            shown = (
                key.removeprefix("blob/")
                if key.startswith("blob/")
                else f"{rest.partition('@')[0]} of {name!r}"
            )
            begin, end = entry["data_offsets"]
            found.append((8 + length + begin, 8 + length + end, shown))
    return found


@dataclass
class Flip:
    """Byte `at` of a file, exclusive-or `mask`, until the end of the block."""

    file: Path
    at: int
    mask: int
    wanted: tuple[str, ...] = ()
    """What an error has to name."""

    def _apply(self) -> None:
        with self.file.open("r+b", buffering=0) as file:
            byte = os.pread(file.fileno(), 1, self.at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ self.mask]), self.at)

    def __enter__(self) -> Flip:
        self._apply()
        return self

    def __exit__(self, *_: object) -> None:
        self._apply()


def flips(path: Path, chance: random.Random, samples: int | None) -> Iterator[Flip]:
    """Of every byte of every file of a checkpoint, or of some bytes of each."""
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        tensors = [] if file.name == NAME else owners(file)
        for at in range(size) if samples is None else sorted(chance.sample(range(size), samples)):
            mask = 1 << chance.randrange(8) if chance.randrange(2) else chance.randrange(1, 256)
            wanted = [f", in {name}" for begin, end, name in tensors if begin <= at < end]
            yield Flip(file, at, mask, (file.name, *wanted))


def save_on_ranks(folder: Path) -> None:
    engine = jobs.engine(2)
    jobs.train(engine, 1)
    engine.save_checkpoint(folder, client_state={"mine": torch.arange(3)})


@pytest.mark.full
def test_every_byte_of_a_small_checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    jobs.on_ranks(request, 2, save_on_ranks, folder=tmp_path)
    path = tmp_path / "global_step1"
    assert problems(path) == ""
    checked = 0
    for flip in flips(path, random.Random(0), None):
        with flip:
            said = problems(path)
        assert all(word in said for word in flip.wanted), (flip, said)
        checked += 1
    assert checked == sum(file.stat().st_size for file in path.iterdir()) > 20000
    assert problems(path) == ""


@pytest.mark.full
def test_a_thousand_bytes_of_a_large_checkpoint(tmp_path: Path) -> None:
    records = [Record(f"layer{i}.weight", torch.randn((1 << 20) + 37 * i)) for i in range(24)]
    path = Path(write(tmp_path, "large", lambda: Content(records=records)))
    (file,) = path.glob("*.safetensors")
    chance, tensors = random.Random(0), owners(file)
    for _ in range(1000):
        flip = Flip(file, chance.randrange(file.stat().st_size), chance.randrange(1, 256))
        with flip:
            said = problems(path)
        wanted = [name for begin, end, name in tensors if begin <= flip.at < end]
        assert file.name in said and all(name in said for name in wanted), (flip, wanted, said)
    assert problems(path) == ""


@ranks(1, 2)
def test_load_checkpoint_names_what_is_damaged(tmp_path: Path) -> None:
    engine = jobs.engine(2)
    engine.progress.write = lambda line: None
    jobs.train(engine, 1)
    path = Path(engine.save_checkpoint(tmp_path, client_state={"mine": torch.arange(3)}))
    dist.barrier()
    for flip in list(flips(path, random.Random(1), 8)):
        dist.barrier()
        if dist.get_rank() == 0:
            flip.__enter__()
        dist.barrier()
        with pytest.raises(CheckpointError) as caught:
            engine.load_checkpoint(tmp_path)
        assert all(word in str(caught.value) for word in flip.wanted), (flip, caught.value)
        dist.barrier()
        if dist.get_rank() == 0:
            flip.__exit__()
    dist.barrier()
    engine.load_checkpoint(tmp_path)


def test_a_changed_byte_of_latest_is_told(tmp_path: Path) -> None:
    record = Record("w", torch.ones(2))
    tags = [f"step{i}" for i in range(10)]  # one changed bit makes one of these of another
    for tag in tags:
        write(tmp_path, tag, lambda: Content(records=[record]))
    pointer = tmp_path / "latest"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.find(tmp_path, None).name == tags[-1]
    for at in range(len(tags[-1])):
        for mask in (*(1 << bit for bit in range(8)), *range(3, 256, 29)):
            with Flip(pointer, at, mask), pytest.warns(UserWarning, match="'latest' names"):
                found = checkpoint.find(tmp_path, None)
            assert found.name in tags
    assert pointer.read_text() == tags[-1]


def test_an_older_checkpoint_that_was_not_to_be_the_latest_is_no_damage(tmp_path: Path) -> None:
    record = Record("w", torch.ones(2))
    write(tmp_path, "a", lambda: Content(records=[record]))
    write(tmp_path, "b", lambda: Content(records=[record]), name_latest=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.find(tmp_path, None).name == "a"
