"""Training goes through the functions of deepspeed.comm."""

from __future__ import annotations

from collections import Counter
from typing import Any

import deepspeed.comm
import pytest
import torch
import torch.distributed as dist

import ds_zero
from compat.engine.test_engine import batch, make
from harness import ranks

COUNTED = ("reduce_scatter_fn", "allgather_fn")


class _Counting:
    """Counts calls of deepspeed.comm's functions, as code does that wraps them."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self._before = {name: getattr(deepspeed.comm, name) for name in COUNTED}

    def __enter__(self) -> Counter[str]:
        for name in COUNTED:
            setattr(deepspeed.comm, name, self._wrapped(name))
        return self.calls

    def _wrapped(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return self._before[name](*args, **kwargs)

        return call

    def __exit__(self, *_: object) -> None:
        for name, function in self._before.items():
            setattr(deepspeed.comm, name, function)


def _reductions(stage: int, *, together: bool) -> tuple[int, dict[str, torch.Tensor]]:
    """Reductions of three backwards of one step, and the parameters after it."""
    engine = make(stage)
    with _Counting() as calls:
        if together:
            with engine.coalesce_grad_reduction():
                for step in range(3):
                    engine.backward(engine(*batch(step, dist.get_rank())))
        else:
            for step in range(3):
                engine.backward(engine(*batch(step, dist.get_rank())))
        engine.step()
    values = ds_zero.full_state_dict(engine.module)
    engine.destroy()
    assert calls["allgather_fn"] > 0 or stage == 0
    return calls["reduce_scatter_fn"], values


@ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reductions_are_counted_and_fewer_where_they_are_coalesced(stage: int) -> None:
    single, expected = _reductions(stage, together=False)
    coalesced, found = _reductions(stage, together=True)
    assert 0 < coalesced == single // 3
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


@ranks(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_all_ranks(dtype: torch.dtype) -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    whole = torch.empty(6, dtype=dtype)
    deepspeed.comm.allgather_fn(whole, torch.full((3,), float(rank), dtype=dtype))
    assert whole.tolist() == [0, 0, 0, 1, 1, 1]
    for op, factor in ((dist.ReduceOp.SUM, 1.0), (dist.ReduceOp.AVG, 0.5), (dist.ReduceOp.MAX, 2 / 3)):
        out = torch.empty(3, dtype=dtype)
        given = (torch.arange(6) * (rank + 1)).to(dtype)
        work = deepspeed.comm.reduce_scatter_fn(out, given, op=op, group=group, async_op=True)
        work.wait()
        expected = torch.arange(6)[3 * rank :][:3] * 3 * factor
        assert torch.allclose(out.float(), expected, rtol=1e-2)
