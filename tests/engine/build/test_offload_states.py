"""State that is moved to the host for a while, and comes back as it was."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_engine
import ds_zero
from ds_zero.params import offload_states
from engine import jobs
from harness import ranks

STAGES = [0, 1, 2, 3]


def job(stage: int, **more: Any) -> ds_engine.Engine:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 20}
    made = jobs.engine(zero_optimization=zero, **more)
    made.progress.write = lambda line: None
    return made


def moving_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same moves from one part of host memory to another."""
    monkeypatch.setattr(offload_states, "_movable", lambda tensor: tensor.untyped_storage().nbytes() > 0)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)


@ranks(1, 2)
@pytest.mark.parametrize("more", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_as_if_nothing_had_been_away(
    monkeypatch: pytest.MonkeyPatch, stage: int, more: dict[str, Any]
) -> None:
    moving_on_a_cpu(monkeypatch)
    straight, engine = job(stage, **more), job(stage, **more)
    wanted = jobs.train(straight, 3)
    found = jobs.train(engine, 1)
    shards = [entry for group in engine.optimizer.param_groups for entry in group["params"]]
    before = [shard.detach().clone() for shard in shards]
    states = [state["exp_avg"] for state in engine.optimizer.state.values()]
    moments = [state.clone() for state in states]
    engine.offload_states(pin_memory=False)
    assert engine.model_state._away is not None and engine.model_state._away.num_bytes > 0
    # What a user can read has its values, elsewhere.
    assert all(torch.equal(shard, was) for shard, was in zip(shards, before, strict=True))
    assert all(torch.equal(state, was) for state, was in zip(states, moments, strict=True))
    engine.reload_states()
    found += jobs.train(engine, 1, first=1)
    engine.offload_states(["optim_states", "hp_params"], pin_memory=False)
    engine.offload_states(["optim_states"], pin_memory=False)  # brings back what is not asked for
    assert torch.isfinite(engine(torch.tensor([1, 2]))).all()  # parameters are here
    engine.reload_states()
    engine.reload_states()
    found += jobs.train(engine, 1, first=2)
    assert found == wanted


@ranks(1)
@pytest.mark.parametrize("stage", [1, 3])
def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    moving_on_a_cpu(monkeypatch)
    engine = job(stage, bf16={"enabled": True})
    jobs.train(engine, 1)
    state = ds_zero.shard.__globals__["_registry"].state_of(engine.module)
    held = {kind: {} for kind in ds_zero.Away.KINDS}  # type: dict[str, dict[int, torch.UntypedStorage]]
    for kind, tensor in offload_states._held(state):
        if tensor.untyped_storage().nbytes():
            held[kind][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    assert all(held[kind] for kind in ("optim_states", "hp_params", "lp_params", "lp_grads"))
    for kind, storages in held.items():
        before = sum(storage.nbytes() for storage in storages.values())
        engine.offload_states([kind], pin_memory=False)
        assert engine.model_state._away is not None and engine.model_state._away.num_bytes == before
        assert sum(storage.nbytes() for storage in storages.values()) == 0
        engine.reload_states()
        assert sum(storage.nbytes() for storage in storages.values()) == before


@ranks(1, 2)
def test_on_a_cpu_nothing_moves_and_the_engine_still_refuses(tmp_path: Path) -> None:
    engine = job(2)
    wanted = jobs.train(engine, 1)
    assert wanted
    engine.offload_states()
    assert engine.model_state._away is not None and engine.model_state._away.num_bytes == 0
    tokens, loss = torch.tensor([1, 2]), torch.ones((), requires_grad=True)
    for refused in (
        lambda: engine(tokens),
        lambda: engine.backward(loss),
        engine.step,
        lambda: engine.save_checkpoint(tmp_path),
        lambda: engine.load_checkpoint(tmp_path),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"were moved to host memory by offload_states\(\): call engine.reload_states\(\)",
        ):
            refused()
    engine.reload_states()
    jobs.train(engine, 1)
    engine.save_checkpoint(tmp_path)
    engine.offload_states(["contiguous_grad_buffer"])  # nothing of that kind is kept
    jobs.train(engine, 1)


class Kind(str, enum.Enum):
    """As DeepSpeed has it."""

    optim_states = "optim_states"


@ranks(1)
def test_what_can_be_asked_for() -> None:
    engine = job(1)
    jobs.train(engine, 1)
    engine.offload_states(include=[Kind.optim_states], device="cpu", pin_memory=False, non_blocking=True)
    engine.reload_states(non_blocking=True)
    with pytest.warns(UserWarning, match="moves nothing"):
        engine.offload_states(device="none")
    with pytest.raises(ValueError, match='can be moved to "cpu" only'):
        engine.offload_states(device="nvme")
    with pytest.raises(ValueError, match=r"include=\['optim_state'\]\): unknown; known are optim_states,"):
        engine.offload_states(["optim_state"])
    jobs.train(engine, 1)
