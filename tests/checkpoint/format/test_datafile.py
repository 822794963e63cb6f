"""The bytes on disk: readable by anyone, and no flipped bit goes unseen."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from ds_checkpoint import Checkpoint, CheckpointError
from ds_checkpoint.format import datafile
from ds_checkpoint.format.datafile import DTYPES, DataFile, FileInfo, Item
from ds_checkpoint.format.manifest import Piece, check_pieces
from ds_checkpoint.write import Content, write


@dataclass(frozen=True)
class Record:
    fqn: str
    state: str
    global_shape: tuple[int, ...]
    flat_offset: int
    data: Tensor
    coordinates: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def save(folder: Path, records: Sequence[Record], **blobs: Tensor) -> Path:
    return Path(write(folder, "tag", lambda: Content(records=records, blobs=blobs, values={"some": "value"})))


def sample(folder: Path) -> Path:
    a = torch.arange(30, dtype=torch.float32)
    return save(
        folder,
        [
            Record("layer.weight", "param", (5, 6), 0, a[:17]),
            Record("layer.weight", "param", (5, 6), 17, a[17:]),
            Record("layer.weight", "exp_avg", (5, 6), 0, (a / 7).bfloat16()),
            Record("layer.weight", "step", (), 0, torch.tensor([3.0])),
            Record("empty", "param", (0, 4), 0, torch.empty(0)),
            Record("flags", "buffer", (3,), 0, torch.tensor([True, False, True])),
        ],
        rng=torch.arange(5, dtype=torch.uint8),
    )


def test_anyone_with_safetensors_can_read_it(tmp_path: Path) -> None:
    path = sample(tmp_path)
    with safe_open(path / "rank-00000-of-00001.safetensors", framework="pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    assert found["layer.weight/param@0"].tolist() == list(range(17))
    assert found["layer.weight/param@17"].tolist() == list(range(17, 30))
    assert found["layer.weight/exp_avg@0"].dtype == torch.bfloat16
    assert found["flags/buffer@0"].tolist() == [True, False, True]
    assert found["blob/rng"].tolist() == [0, 1, 2, 3, 4]


def test_tensors_come_back_whole(tmp_path: Path) -> None:
    with Checkpoint(sample(tmp_path)) as checkpoint:
        assert torch.equal(checkpoint.tensor("layer.weight"), torch.arange(30.0).view(5, 6))
        assert checkpoint.tensor("layer.weight", "step").shape == ()
        assert checkpoint.tensor("empty").shape == (0, 4)
        assert torch.equal(checkpoint.blob("rng"), torch.arange(5, dtype=torch.uint8))
        assert checkpoint.states("layer.weight")["exp_avg"] == ((5, 6), torch.bfloat16)
        assert checkpoint.states("unknown") == {}
        assert checkpoint.manifest.values == {"some": "value"}
        assert list(checkpoint.verify()) == []


def damage(path: Path) -> str | None:
    """What opening and reading everything says; None if nothing is found."""
    try:
        with Checkpoint(path) as checkpoint:
            return "; ".join(checkpoint.verify()) or None
    except (CheckpointError, FileNotFoundError) as error:
        return str(error)


def test_every_flipped_bit_is_found_and_names_its_file(tmp_path: Path) -> None:
    path = sample(tmp_path)
    assert damage(path) is None
    checked = 0
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for at in range(len(original)):
            changed = bytearray(original)
            changed[at] ^= 1 << (at % 8)
            file.write_bytes(changed)
            said = damage(path)
            assert said is not None and file.name in said, f"byte {at} of {file.name}"
            checked += 1
        file.write_bytes(original)
    assert checked > 2000
    assert damage(path) is None


def test_damage_names_the_tensor(tmp_path: Path) -> None:
    path = sample(tmp_path)
    file = path / "rank-00000-of-00001.safetensors"
    raw = bytearray(file.read_bytes())
    # fp32 comes first, so the first byte of data belongs to the first piece of the weight.
    with Checkpoint(path) as checkpoint:
        begin = checkpoint.manifest.files[file.name].header_bytes
    raw[begin + 4] ^= 1
    file.write_bytes(raw)
    said = damage(path)
    assert said is not None and "param of 'layer.weight'" in said and "are damaged" in said


@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "empty manifest", "no manifest"])
def test_other_damage(tmp_path: Path, change: str) -> None:
    path = sample(tmp_path)
    file = path / "rank-00000-of-00001.safetensors"
    if change == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    elif change == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    elif change == "missing":
        file.unlink()
    elif change == "empty manifest":
        (path / "manifest.json").write_bytes(b"")
    else:
        (path / "manifest.json").unlink()
    said = damage(path)
    assert said is not None and ("manifest.json" if "manifest" in change else file.name) in said


def test_a_file_that_is_gone_is_told_and_not_raised_in_the_middle_of_a_load(tmp_path: Path) -> None:
    path = sample(tmp_path)
    (path / "rank-00000-of-00001.safetensors").unlink()
    with Checkpoint(path) as checkpoint:
        checkpoint.read("layer.weight", "param", 3, torch.empty(4))
        assert len(checkpoint.problems) == 1
        assert (
            "cannot be opened" in checkpoint.problems[0]
            and "param of 'layer.weight'" in checkpoint.problems[0]
        )
        with pytest.raises(CheckpointError, match="cannot be opened"):
            checkpoint.check_files()
        checkpoint.check_files(1, 2)  # another rank's share


def test_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_checkpoint.format.manifest.VERSION", 3)
    path = sample(tmp_path)
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match="version 3, this ds-checkpoint reads ds-checkpoint up to version 2"
    ):
        Checkpoint(path)


@given(
    numel=st.integers(0, 3000),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
    ranges=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]),
    wanted=st.sampled_from([None, torch.float32, torch.float64]),
)
@settings(max_examples=60, deadline=None)
def test_any_range_of_any_cut_reads_back(
    tmp_path_factory: pytest.TempPathFactory,
    numel: int,
    cuts: list[int],
    ranges: list[tuple[int, int]],
    dtype: torch.dtype,
    wanted: torch.dtype | None,
) -> None:
    whole = torch.arange(numel).to(dtype)
    edges = sorted({0, numel, *(min(c, numel) for c in cuts)})
    pieces = list(itertools.pairwise(edges)) or [(0, 0)]
    patch = pytest.MonkeyPatch()
    patch.setattr(datafile, "MIN_BLOCK_BYTES", 1024)  # several blocks in a small tensor
    try:
        path = save(
            tmp_path_factory.mktemp("c"),
            [Record("t", "param", (numel,), a, whole[a:b]) for a, b in reversed(pieces)],
        )
    finally:
        patch.undo()
    with Checkpoint(path) as checkpoint:
        asked = torch.zeros(numel + 1, dtype=torch.bool)
        for a, b in [*ranges, (0, numel)]:
            low, high = sorted((min(a, numel), min(b, numel)))
            out = torch.empty(high - low, dtype=wanted or dtype)
            checkpoint.read("t", "param", low, out)
            assert torch.equal(out, whole[low:high].to(out.dtype))
            asked[low:high] = True
            assert checkpoint.was_read("t", "param", low, high)
            gap = int(asked.long().argmin())
            if gap < numel:
                assert not checkpoint.was_read("t", "param", gap, gap + 1)
        assert checkpoint.problems == []


def test_a_range_verifies_only_what_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datafile, "MIN_BLOCK_BYTES", 1024)
    path = save(tmp_path, [Record("t", "param", (1024,), 0, torch.arange(1024.0))])
    (file,) = path.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # in the last of four blocks
    file.write_bytes(raw)
    with Checkpoint(path) as checkpoint:
        checkpoint.read("t", "param", 0, torch.empty(768))
        assert checkpoint.problems == []
        checkpoint.read("t", "param", 700, torch.empty(100))
        assert len(checkpoint.problems) == 1 and "param of 't'" in checkpoint.problems[0]
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.tensor("t")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2, (3 * dtype.itemsize,), dtype=torch.uint8)
    path = save(tmp_path, [Record("t", "param", (3,), 0, raw.view(dtype))])
    with Checkpoint(path) as checkpoint:
        assert torch.equal(checkpoint.tensor("t").view(torch.uint8), raw)


def test_a_dtype_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'t/param@0' has dtype torch.complex64"):
        save(tmp_path, [Record("t", "param", (1,), 0, torch.zeros(1, dtype=torch.complex64))])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ranges", "wanted"),
    [
        ([(0, 3), (4, 6)], "elements 3 to 4 of t are missing"),
        ([(0, 3), (2, 4)], "elements 2 to 3 of t appear twice"),
        ([(0, 5)], "t has 10 elements, but its pieces have 5"),
        ([], "t has 10 elements, but its pieces have 0"),
    ],
)
def test_pieces_have_to_cover_a_tensor_exactly(ranges: list[tuple[int, int]], wanted: str) -> None:
    pieces = [Piece(file="f", key="k", flat_offset=a, numel=b - a, crc32c="") for a, b in ranges]
    with pytest.raises(CheckpointError, match=wanted):
        check_pieces("t", (10,), pieces)


def test_a_save_that_would_lack_elements_fails(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="param of 't' has 10 elements, but its pieces have 5"):
        save(tmp_path, [Record("t", "param", (10,), 0, torch.zeros(5))])
    assert list(tmp_path.iterdir()) == []


def test_large_files_have_larger_blocks() -> None:
    assert datafile.block_bytes_for(100) == 1 << 20
    assert datafile.block_bytes_for(4096 << 20) == 1 << 20
    assert datafile.block_bytes_for((4096 << 20) + 1) == 1 << 21
    assert datafile.block_bytes_for(120 * 10**9) == 1 << 25


def test_data_starts_on_a_cache_line_and_each_tensor_on_its_element(tmp_path: Path) -> None:
    items = [
        Item(key=f"{dtype}", data=torch.zeros(3, dtype=dtype))
        for dtype in (torch.bool, torch.bfloat16, torch.float64)
    ]
    written = datafile.write(tmp_path / "f", items)
    assert written.info.header_bytes % 64 == 0
    file = DataFile(tmp_path / "f", written.info)
    assert all(place.begin % place.dtype.itemsize == 0 for place in file._places.values())
    file.close()
    with pytest.raises(CheckpointError, match="header is damaged"):
        DataFile(tmp_path / "f", FileInfo(**{**vars(written.info), "header_crc32c": "00000000"}))
