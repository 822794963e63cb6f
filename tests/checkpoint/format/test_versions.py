"""Checkpoints of all manifest versions stay readable; tests/golden/checkpoints holds them as they were written."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

import ds_checkpoint
import ds_zero
from ds_checkpoint import CheckpointError, open_checkpoint
from ds_checkpoint.format.version_1 import separated
from harness import ranks

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "checkpoints"
VERSIONS = ["version1", "version2"]


def facts(version: str, kind: str, part: int, when: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads((GOLDEN / version / kind / f"facts{part}.json").read_text())[
        when
    ]
    return found


def maker() -> ModuleType:
    """The script that wrote the folders, for the models of its jobs."""
    spec = importlib.util.spec_from_file_location("make_golden_checkpoints", GOLDEN / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("kind", "part", "coordinates"),
    [
        ("plain", 0, {}),
        ("experts", 0, {"expert": (0, 2)}),
        ("experts", 1, {"expert": (1, 2)}),
        ("parts", 0, {"tensor": (0, 2)}),
        ("parts", 1, {"tensor": (1, 2)}),
    ],
)
def test_every_tensor_is_found_by_name_and_coordinates(
    version: str, kind: str, part: int, coordinates: dict[str, tuple[int, int]]
) -> None:
    with open_checkpoint(GOLDEN / version / kind) as checkpoint:
        assert list(checkpoint.verify()) == []
        assert not [fqn for fqn in checkpoint.manifest.tensors if "#" in fqn]
        saved = facts(version, kind, part, "saved")
        for name, values in saved.items():
            fqn, _, state = name.rpartition("/")
            own = {} if (kind, fqn) == ("experts", "dense") else coordinates
            state = state if state in checkpoint.states(fqn, own) else "buffer"
            assert checkpoint.tensor(fqn, state, own).double().flatten().tolist() == values, name
    assert len(saved) >= 4


@ranks(2, groups_may_stay=True)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_job_goes_on_from_parts(version: str) -> None:
    """Written on four ranks, two of them along the axis of the parts; two ranks go on."""
    make = maker()
    mpu = make.Mpu()
    part = mpu.get_model_parallel_rank()
    engine = make.make_engine(make.Part(part), mpu)
    _, client_state = engine.load_checkpoint(GOLDEN / version / "parts")
    assert client_state["n"] == 7 and engine.global_steps == 2
    make.step(engine, 6)
    after = facts(version, "parts", part, "after")
    found = make.values(engine.module)
    assert found.keys() == after.keys()
    for name, values in after.items():
        assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-6), name
    engine.destroy()
    model, optimizer, index = make.make_experts(filled=False)
    with open_checkpoint(GOLDEN / version / "experts") as checkpoint:
        ds_zero.load_records(model, optimizer, checkpoint)
    assert make.values(model) == facts(version, "experts", index, "saved")
    ds_zero.destroy(model)


@ranks(1, 2)
@pytest.mark.parametrize("version", VERSIONS)
def test_sizes_of_axes_that_have_to_agree(version: str) -> None:
    """Experts of a size of two, in a model that has one; parts, in a model that is whole."""
    make = maker()
    experts = make.Experts(0)
    optimizer = torch.optim.AdamW(experts.parameters(), foreach=True)
    ds_zero.shard(experts, optimizer, 1)
    before = ds_zero.full_state_dict(experts)
    asked = r"'expert' differ along the axis 'expert', which has size 2 in the checkpoint and 1 in this job"
    with open_checkpoint(GOLDEN / version / "experts") as checkpoint:
        with pytest.raises(CheckpointError, match=asked):
            ds_zero.load_records(experts, optimizer, checkpoint)
        with pytest.raises(CheckpointError, match="has size 2 in the checkpoint and 4 in this job"):
            checkpoint.tensor("expert", "param", {"expert": (0, 4)})
        with pytest.raises(
            CheckpointError, match="the axis 'tensor', which has size 1 in the checkpoint and 2"
        ):
            checkpoint.tensor("dense", "param", {"tensor": (0, 2)})
    after = ds_zero.full_state_dict(experts)
    assert all(torch.equal(before[name], after[name]) for name in before)
    if dist.get_rank() == 0:
        with pytest.raises(
            CheckpointError, match=r"expert 0 of 2.*checkpoint.tensor\('expert', 'param', {'expert'"
        ):
            ds_checkpoint.state_dict(GOLDEN / version / "experts")
    ds_zero.destroy(experts)


@pytest.mark.parametrize("kind", ["plain", "experts", "parts"])
def test_version_1_is_converted_to_version_2(kind: str, tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="random generators")
        if kind != "experts"
        else contextlib.nullcontext()
    ):
        ds_checkpoint.convert(GOLDEN / "version1" / kind, tmp_path)
    raw = next(tmp_path.glob("*/manifest.json")).read_text()
    assert '"version":2' in raw and "#" not in raw
    with open_checkpoint(tmp_path) as new, open_checkpoint(GOLDEN / "version1" / kind) as old:
        assert list(new.verify()) == [] and new.manifest.num_tensors == old.manifest.num_tensors
        for fqn, state, entry in old.manifest.entries():
            at = entry.coordinates
            assert torch.equal(new.tensor(fqn, state, at), old.tensor(fqn, state, at)), (fqn, state, at)
        assert new.manifest.values.get("model_axes") == old.manifest.values["model_axes"]


@pytest.mark.parametrize(
    ("stored", "fqn", "coordinates"),
    [
        ("a.w", "a.w", {}),
        ("a.w#1of4", "a.w", {"expert": (1, 4)}),
        ("a.w#part0of2", "a.w", {"tensor": (0, 2)}),
        ("a.w#1of4#part0of2", "a.w", {"expert": (1, 4), "tensor": (0, 2)}),
        ("a#1of2.w", "a#1of2.w", {}),
    ],
)
def test_names_of_version_1(stored: str, fqn: str, coordinates: dict[str, tuple[int, int]]) -> None:
    assert separated(stored) == (fqn, coordinates)
