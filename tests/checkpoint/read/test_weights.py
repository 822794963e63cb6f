"""Stored weights of unknown origin: read, or refused as what they are."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_checkpoint import CheckpointError
from ds_checkpoint.read.weights import open_weights


def safetensors(path: Path, header: bytes | dict[str, object], data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(first: int, last: int, shape: list[object] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(last - first) // 4], "data_offsets": [first, last]}


def test_sound_files_are_read(tmp_path: Path) -> None:
    values = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "c": torch.empty(0)}
    save_file(values, tmp_path / "model.safetensors")
    torch.save({"d": torch.ones(2)}, tmp_path / "more.bin")
    with open_weights(tmp_path) as weights:
        assert all(torch.equal(weights[name](), value) for name, value in values.items())
    with open_weights({"checkpoints": ["model.safetensors", "more.bin"]}, str(tmp_path)) as weights:
        assert set(weights) == {"a", "b", "c", "d"} and torch.equal(weights["d"](), torch.ones(2))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not a safetensors header"),
        (b"[1]", "not a safetensors header"),
        (b"[" * 100_000, "not a safetensors header"),
        ({"a": entry(0, 16), "b": entry(8, 16)}, "'b' overlaps"),
        ({"a": entry(0, 4), "b": entry(8, 16)}, "'b' follows a gap"),
        ({"a": entry(0, 8)}, "8 bytes belong to no tensor"),
        ({"a": entry(0, 32)}, "lies outside of"),
        ({"a": entry(0, 16, [2**62, 2**62])}, "lies outside of"),
        ({"a": entry(0, 16, [-4])}, "not a safetensors header"),
        ({"a": entry(0, 16, ["4"])}, "not a safetensors header"),
        ({"a": entry(0, 16, dtype="F33")}, "not a safetensors header"),
        ({"a": {"dtype": "F32"}}, "not a safetensors header"),
        ({"a": 5}, "not a safetensors header"),
        (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": 1}', "a key twice"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, header: bytes | dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        with open_weights(safetensors(tmp_path / "model.safetensors", header)):
            pass


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for content in (b"", b"1234", struct.pack("<Q", 2**60) + b"{}"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is not a safetensors file|its header claims"):
            with open_weights(file):
                pass


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": 1}', b'{"weight_map": {"a": 5}}'])
def test_damaged_indexes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        with open_weights(tmp_path):
            pass


def test_damaged_torch_files_and_names_that_come_twice(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04 nothing"):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            with open_weights(tmp_path):
                pass
    torch.save([1], tmp_path / "list.bin")
    with pytest.raises(CheckpointError, match="contains a list instead of a dict"):
        with open_weights(tmp_path / "list.bin"):
            pass
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="'a', which another of the files contains, too"):
        with open_weights({"checkpoints": ["x.safetensors", "y.safetensors"]}, str(tmp_path)):
            pass
