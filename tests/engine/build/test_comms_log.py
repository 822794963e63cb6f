"""`comms_logger`: training is the same, and its collectives are counted with their bytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ds_engine
from ds_comm.log import Summary
from ds_zero import _registry
from ds_zero.comm.logged import LoggedComm
from harness import ranks

STEPS = 3


def train(
    section: dict[str, Any], zero: dict[str, Any], **more: Any
) -> tuple[list[float], Summary | None, int]:
    """Returns losses, the summary, and the bytes that ds_zero has counted on this rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage3_param_persistence_threshold": 0, **zero},
        "startup_summary": False,
        "comms_logger": section,
        **more,
    }
    engine = ds_engine.initialize(model, config)[0]
    comm = _registry.state_of(model).comm
    losses = []
    log = engine.roles.comms_log
    assert isinstance(comm._inner, LoggedComm) == (log is not None)  # type: ignore[attr-defined]
    if log is not None:
        log.reset()
    before = comm.gathered_bytes + comm.reduced_bytes
    for step in range(STEPS):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step + 10 * dist.get_rank()))
        loss = (engine(x) - x).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    sent = comm.gathered_bytes + comm.reduced_bytes - before
    summary = None if log is None else log.log_summary(show_straggler=True)
    engine.destroy()
    return losses, summary, sent


def sent_by_zero(summary: Summary) -> float:
    return sum(
        line.sent_bytes for line in summary.lines if line.operation in ("all_gather", "reduce_scatter")
    )


@ranks(2)
def test_the_bytes_of_training_are_recorded_and_nothing_else_changes() -> None:
    function = dist.all_reduce
    for zero in ({"stage": 2}, {"stage": 3}, {"stage": 3, "zero_quantized_weights": True}):
        plain, nothing, _ = train({}, zero)
        losses, summary, sent = train({"enabled": True}, zero)
        assert nothing is None
        assert losses == plain
        assert summary is not None
        assert sent_by_zero(summary) == sent > 0
        operations = {line.operation for line in summary.lines}
        assert "all_reduce" in operations  # the norms, by torch.distributed
        assert "all_to_all_single" not in operations  # parts of the quantised all-gather
        assert dist.all_reduce is function  # put back by destroy()


@ranks(2)
def test_prof_ops_selects_and_a_one_bit_optimizer_is_seen() -> None:
    _, summary, _ = train({"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]}, {"stage": 2})
    assert summary is not None
    assert {line.operation for line in summary.lines} == {"all_reduce"}
    onebit = {"type": "OneBitAdam", "params": {"lr": 1e-2, "freeze_step": 1}}
    _, summary, _ = train({"enabled": True, "debug": True}, {"stage": 0}, optimizer=onebit)
    assert summary is not None
    signs = [line for line in summary.lines if line.operation == "all_to_all_single"]
    assert sum(line.count for line in signs) == 2 * (
        STEPS - 1
    )  # two phases, without those of the dense steps
    assert all("ds_comm.exchange.channel" in line.caller for line in signs)
