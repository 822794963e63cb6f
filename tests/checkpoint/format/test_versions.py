"""Checkpoints of earlier manifest versions stay readable; tests/golden/checkpoints holds them as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_checkpoint import open_checkpoint

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "checkpoints"


@pytest.mark.parametrize(
    ("kind", "part", "suffix"),
    [
        ("plain", 0, ""),
        ("experts", 0, "#0of2"),
        ("experts", 1, "#1of2"),
        ("parts", 0, "#part0of2"),
        ("parts", 1, "#part1of2"),
    ],
)
def test_version_1_holds_what_was_saved(kind: str, part: int, suffix: str) -> None:
    facts = json.loads((GOLDEN / kind / f"facts{part}.json").read_text())["saved"]
    with open_checkpoint(GOLDEN / kind) as checkpoint:
        assert list(checkpoint.verify()) == []
        compared = 0
        for name, values in facts.items():
            fqn, _, state = name.rpartition("/")
            stored = fqn + suffix if fqn + suffix in checkpoint.manifest.tensors else fqn
            kind_of = "buffer" if state not in checkpoint.states(stored) else state
            assert checkpoint.tensor(stored, kind_of).double().flatten().tolist() == values, name
            compared += 1
    assert compared >= 4
