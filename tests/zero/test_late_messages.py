"""Messages that arrive at the last moment: whoever reads too early gets NaN, whoever writes too early is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_zero
from ds_zero.comm.direct import DirectAllGather, OrderedReduceScatter
from ds_zero.tensors.fingerprint import fingerprint
from harness import ranks
from zero.models import Tiny, batch
from zero.parity import everywhere


class Late:
    """Does everything in `wait`; until then the output is NaN, and the input must stay as it was."""

    def __init__(self, sends: Tensor, run: Callable[[], object]) -> None:
        self._sends, self._before, self._run = sends, fingerprint(sends), run
        self._done = False

    def wait(self) -> None:
        if not self._done:
            assert fingerprint(self._sends) == self._before, "what travels was written before it had arrived"
            self._done = True
            self._run()


class LateGather:
    def __call__(self, output: Tensor, input: Tensor, group: Any, async_op: bool = False) -> Late | None:
        slices = output.view(group.size(), -1)
        for rank in range(group.size()):
            if rank != group.rank():
                slices[rank].fill_(float("nan"))
        work = Late(slices[group.rank()], lambda: DirectAllGather()(output, input, group))
        return work if async_op else work.wait()


class LateReduce(LateGather):
    def __call__(  # type: ignore[override]
        self, output: Tensor, input: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Late | None:
        output.fill_(float("nan"))
        work = Late(input, lambda: OrderedReduceScatter()(output, input, group, op))
        return work if async_op else work.wait()


def train(stage: int, late: bool, micros: int, **config: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Tiny(extras=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    comm = ds_zero.Comm(LateGather(), LateReduce()) if late else None
    options = ds_zero.ZeroConfig(reduce_bucket_numel=700, persistence_threshold_numel=20, **config)
    ds_zero.shard(model, optimizer, stage, config=options, comm=comm)
    for step in range(3):
        for micro in range(micros):
            model(*batch(step * micros + micro, dist.get_rank())).backward()
        ds_zero.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return everywhere(ds_zero.full_state_dict(model))


@ranks(2, 3)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nobody_reads_or_writes_before_messages_have_arrived(stage: int) -> None:
    for plan in ("local", "sharded"):
        config = {"accumulation": plan, "overlap_publish": stage in (1, 2)}
        expected = train(stage, False, 2, **config)
        found = train(stage, True, 2, **config)
        assert all(torch.equal(found[name], expected[name]) for name in expected), plan


@ranks(2)
def test_the_check_catches_both() -> None:
    whole = torch.zeros(4)
    rank, group = dist.get_rank(), dist.group.WORLD
    work = LateGather()(whole, whole[2 * rank : 2 * rank + 2], group, async_op=True)
    assert whole[2 - 2 * rank].isnan()
    whole[2 * rank] = 1
    assert work is not None
    with pytest.raises(AssertionError, match="written before"):
        work.wait()
