"""`ds_zero.control`: gathering by hand, beside the hooks, and who reduces gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from contracts.test_gathering_drivers import DIM, by_hooks, chain, data, sharded, states
from ds_zero.comm.collectives import default_comm
from ds_zero.runtime.bucket import BucketState
from harness import ranks
from zero.parity import everywhere

SHARDED, GATHERED = {BucketState.SHARDED}, {BucketState.GATHERED}


@ranks(2)
def test_unshard_holds_parameters_until_reshard() -> None:
    model, _ = sharded()
    expected = chain()[1][0].weight
    control = ds_zero.control(model, model[1])
    assert control.unshard() is None
    assert torch.equal(model[1][0].weight, expected)
    control.unshard()  # has no effect
    model(data(0))
    assert states(model, model[1]) == GATHERED
    assert states(model, model[0]) == SHARDED
    ds_zero.control(model, model[1]).reshard()
    assert states(model, model[1]) == SHARDED


@ranks(2)
def test_unshard_ahead_is_complete_after_wait() -> None:
    model, _ = sharded()
    handle = ds_zero.control(model).unshard(async_op=True)
    assert handle is not None
    assert states(model, model) == {BucketState.GATHERING}
    handle.wait()
    assert torch.equal(model[2][2].bias, chain()[2][2].bias)
    ds_zero.control(model).reshard()
    handle.wait()  # has nothing to do any more
    assert states(model, model) == SHARDED


@ranks(2)
def test_reshard_between_forward_and_backward_lets_hooks_gather_again() -> None:
    model, optimizer = sharded()
    expected = by_hooks()
    for step in range(2):
        ds_zero.control(model).unshard()
        loss = model(data(step)).square().mean()
        ds_zero.control(model).reshard()
        assert states(model, model) == SHARDED
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = everywhere(ds_zero.full_state_dict(model))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@ranks(2)
def test_a_step_ends_what_is_unsharded() -> None:
    model, optimizer = sharded()
    ds_zero.control(model).unshard()
    model(data(0)).square().mean().backward()
    assert states(model, model) == GATHERED
    optimizer.step()
    assert states(model, model) == SHARDED


@ranks(2)
def test_set_reshard_after_forward_saves_a_gather() -> None:
    def gathered_bytes(*, stays: bool) -> int:
        comm = default_comm(torch.device("cpu"))
        model = chain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = ds_zero.ZeroConfig(persistence_threshold_numel=0, prefetch=False)
        model, optimizer = ds_zero.shard(model, optimizer, 3, config=config, comm=comm)
        if stays:
            ds_zero.control(model, model[0]).set_reshard_after_forward(False)
        loss = model(data(0)).square().mean()
        assert states(model, model[0]) == (GATHERED if stays else SHARDED)
        loss.backward()
        assert states(model, model) == SHARDED
        return comm.gathered_bytes

    assert gathered_bytes(stays=True) < gathered_bytes(stays=False)


@ranks(2)
def test_set_requires_gradient_sync_defers_reduction() -> None:
    comm = default_comm(torch.device("cpu"))
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = ds_zero.shard(model, optimizer, 2, comm=comm)
    control = ds_zero.control(model)
    control.set_requires_gradient_sync(False)
    model(data(0)).square().mean().backward()
    assert comm.reduced_bytes == 0
    control.set_requires_gradient_sync(True)
    model(data(1)).square().mean().backward()
    assert comm.reduced_bytes > 0
    plain = chain()
    for rank in range(2):
        for step in range(2):
            x = torch.randn(4, DIM, generator=torch.Generator().manual_seed(10 * step + rank))
            (plain(x).square().mean() / 2).backward()
    for name, param in plain.named_parameters():
        torch.testing.assert_close(ds_zero.get_full(model, name, "grad"), param.grad)


class ReducesByItself(torch.optim.SGD):
    """As 1-bit Adam does: sees its own gradients, and sends what it likes."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        for group in self.param_groups:
            for param in group["params"]:
                dist.all_reduce(param.grad)
                param.grad /= dist.get_world_size()
        super().step()


@ranks(2)
def test_with_reduction_none_the_optimizer_reduces() -> None:
    comm = default_comm(torch.device("cpu"))
    model, plain = chain(), chain()
    optimizer = ReducesByItself(model.parameters(), lr=0.1)
    model, optimizer = ds_zero.shard(model, optimizer, 0, comm=comm)
    ds_zero.control(model).set_reduction("none")
    reference = ReducesByItself(plain.parameters(), lr=0.1)
    for step in range(2):
        for micro in range(2):
            model(data(2 * step + micro)).square().mean().backward()
            plain(data(2 * step + micro)).square().mean().backward()
        optimizer.step()
        reference.step()
        for entry, seen, own in zip(
            optimizer.param_groups[0]["params"], optimizer.seen, reference.seen, strict=True
        ):
            assert entry.numel() == own.numel()
            torch.testing.assert_close(seen.view(-1), own.view(-1))
        optimizer.zero_grad()
        reference.zero_grad()
    assert comm.reduced_bytes == 0
    for name, param in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), param)
    with pytest.raises(ValueError, match="clip in the optimizer"):
        ds_zero.clip_grad_norm_(model, 1.0)


@ranks(2)
def test_none_is_refused_where_ranks_own_parts() -> None:
    model, _ = sharded()
    with pytest.raises(ValueError, match="stage=0"):
        ds_zero.control(model).set_reduction("none")
    with pytest.raises(ValueError, match="'none', 'local', 'sharded'"):
        ds_zero.control(model).set_reduction("both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduced together"):
        ds_zero.control(model, model[0]).set_reduction("local")
    with pytest.raises(ValueError, match="not a module of"):
        ds_zero.control(model, nn.Linear(1, 1))


@ranks(2)
def test_reduction_changes_between_steps_only() -> None:
    model, optimizer = sharded()
    control = ds_zero.control(model)
    assert control.reduction == "sharded"
    model(data(0)).square().mean().backward()
    with pytest.raises(ValueError, match="between a backward and its step"):
        control.set_reduction("local")
    optimizer.step()
    optimizer.zero_grad()
    control.set_reduction("local")
    model(data(1)).square().mean().backward()
    optimizer.step()
    expected, found = by_hooks(), everywhere(ds_zero.full_state_dict(model))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
