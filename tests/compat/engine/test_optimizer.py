"""What code reads on the optimizer that `deepspeed.initialize` returns."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import ds_zero
from compat.engine.test_engine import batch, make
from harness import ranks


@ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_groups_are_views_of_what_is_trained(stage: int, bf16: bool) -> None:
    engine = make(stage, bf16={"enabled": bf16})
    optimizer = engine.optimizer
    params = list(engine.module.parameters())
    [group] = optimizer.bit16_groups
    assert {id(p) for p in group} == {id(p) for p in params} and len(group) == len(params)
    assert optimizer.fp16_groups[0][0] is optimizer.bit16_groups[0][0]
    assert all(part.dtype == torch.float32 and part.ndim == 1 for part in optimizer.fp32_groups_flat)
    engine.backward(engine(*batch(0, dist.get_rank())))
    own = sum(part.numel() for part in optimizer.single_partition_of_fp32_groups)
    [gradients] = optimizer.averaged_gradients.values()
    assert gradients is not None and sum(g.numel() for g in gradients) == own
    engine.step()
    assert optimizer.averaged_gradients == {0: None}
    if stage == 3:
        slices = optimizer.fp16_partitioned_groups_flat
        masters = {id(part): part for part in optimizer.fp32_partitioned_groups_flat}
        assert [s.numel() for s in slices] == [m.numel() for m in masters.values()]
        assert all(torch.equal(s, m.to(s.dtype)) for s, m in zip(slices, masters.values(), strict=True))
    else:
        flat = optimizer.bit16_groups_flat
        assert all(t.ndim == 1 and t.grad_fn is None and t.dtype == params[0].dtype for t in flat)
        assert sum(t.numel() for t in flat) >= sum(p.numel() for p in params)
        flat[0].fill_(3.0)
        assert any(bool((p == 3.0).all()) for p in params)
        assert optimizer.accumulated_grads_in_cpu == {}
    engine.destroy()
    assert not any(ds_zero.presence(p) for p in params)
