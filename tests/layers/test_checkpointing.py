"""Checkpointing: the gradients of the plain call, inputs at rest where they were asked to be."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ds_layers import Checkpointing, CheckpointingConfig, RngTracker, model_parallel_seed
from harness import ranks

DIM = 8


class Block(nn.Module):
    def __init__(self, tracker: RngTracker | None = None) -> None:
        super().__init__()
        self.up, self.down, self.tracker = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM), tracker

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = F.dropout(F.gelu(self.up(x)), 0.3, self.training)
        if self.tracker is not None:
            with self.tracker.fork():
                h = F.dropout(h, 0.3, self.training)
        out: Tensor = x + self.down(h)
        return out if scale is None else out * scale


def gradients(
    call: Callable[..., Any], blocks: nn.ModuleList, x: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    h = x * 1.0  # not a leaf: something that a block before has computed
    for block in blocks:
        h = call(block, h, scale=torch.tensor(0.5))
    loss = h.square().sum()
    blocks.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return loss.detach(), x.grad, [p.grad.clone() for p in blocks.parameters() if p.grad is not None]


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len(one[2]) == len(other[2]) > 0
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


@pytest.mark.parametrize("contiguous", [False, True])
def test_same_gradients_as_the_plain_call_with_dropout_of_two_streams(contiguous: bool) -> None:
    tracker = RngTracker("cpu")
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(tracker) for _ in range(3))
    config = CheckpointingConfig(contiguous=contiguous, num_checkpoints=3)
    checkpointing = Checkpointing(config, tracker)
    x = torch.randn(5, DIM)
    model_parallel_seed(tracker, 7, 0)
    plain = gradients(lambda block, *a, **k: block(*a, **k), blocks, x)
    model_parallel_seed(tracker, 7, 0)
    assert_same(plain, gradients(checkpointing, blocks, x))
    assert checkpointing.statistics.checkpoints == checkpointing.statistics.recomputations == 3
    # The streams go on as they would have without any recomputation.
    after = torch.rand(3)
    with tracker.fork():
        forked = torch.rand(3)
    model_parallel_seed(tracker, 7, 0)
    gradients(lambda block, *a, **k: block(*a, **k), blocks, x)
    assert torch.equal(after, torch.rand(3))
    with tracker.fork():
        assert torch.equal(forked, torch.rand(3))


@ranks(2)
def test_partitioned_inputs_rest_divided_and_come_back_whole(world_size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(2))
    checkpointing = Checkpointing(CheckpointingConfig(group=group, partition=True))
    x = torch.randn(5, DIM)
    torch.manual_seed(3)
    plain = gradients(lambda block, *a, **k: block(*a, **k), blocks, x)
    torch.manual_seed(3)
    assert_same(plain, gradients(checkpointing, blocks, x))
    half = 4 * (5 * DIM // world_size)
    assert checkpointing.statistics.resting_bytes == 2 * half  # two inputs; the scale is too small to divide


@ranks(2)
def test_a_number_of_elements_that_ranks_do_not_divide(world_size: int) -> None:
    checkpointing = Checkpointing(CheckpointingConfig(group=dist.group.WORLD, partition=True))
    torch.manual_seed(0)
    x = torch.randn(7, requires_grad=True)
    out = checkpointing(lambda t: t.sin(), x * 1.0)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().cos())
    assert checkpointing.statistics.resting_bytes == 4 * 4  # ceil(7 / 2) on each rank


def test_what_lies_inside_is_not_kept_and_what_is_partitioned_lets_its_input_go() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def layer(x: Tensor) -> Tensor:
        inner = x.exp()
        kept.append(weakref.ref(inner))
        return inner.sin()

    x = torch.randn(4, requires_grad=True)
    out = Checkpointing()(layer, x)
    gc.collect()
    assert kept[0]() is None
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (x.exp() * x.exp().cos()).detach())

    given = x * 2
    whole = weakref.ref(given)
    out = Checkpointing(CheckpointingConfig(contiguous=True, num_checkpoints=1))(layer, given)
    del given
    gc.collect()
    assert whole() is None
    out.sum().backward()


def test_slabs_are_used_again_and_do_not_grow() -> None:
    checkpointing = Checkpointing(CheckpointingConfig(contiguous=True, num_checkpoints=2))
    blocks = nn.ModuleList(Block() for _ in range(2))
    x = torch.randn(5, DIM)
    gradients(checkpointing, blocks, x)
    assert checkpointing._slabs is not None
    size = checkpointing._slabs.num_bytes
    assert size == 2 * 2 * 4 * (5 * DIM) // 2 + 2 * 4  # two inputs of a block, two scales
    for _ in range(5):
        gradients(checkpointing, blocks, x)
        gc.collect()
    assert checkpointing._slabs.num_bytes == size
    checkpointing.reset()
    assert checkpointing._slabs.num_bytes == 0


def test_inputs_inside_containers_and_outputs_of_any_shape() -> None:
    def layer(pair: tuple[Tensor, Tensor], *, options: dict[str, Any]) -> dict[str, Any]:
        a, b = pair
        return {"sum": a + b * options["factor"], "n": 3}

    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    out = Checkpointing()(layer, (a * 1, b * 1), options={"factor": 3.0})
    assert out["n"] == 3
    out["sum"].sum().backward()
    assert a.grad is not None and b.grad is not None
    assert a.grad.tolist() == [1, 1] and b.grad.tolist() == [3, 3]


def test_inputs_that_need_no_gradient_while_parameters_do() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    Checkpointing()(linear, torch.ones(2, 3)).sum().backward()
    assert linear.bias.grad is not None and linear.bias.grad.tolist() == [2, 2, 2]


def test_nested_and_without_gradients() -> None:
    checkpointing = Checkpointing()
    x = torch.linspace(-1, 1, 5, requires_grad=True)
    out = checkpointing(lambda t: checkpointing(torch.sin, t * 2).exp(), x)
    out.sum().backward()
    assert x.grad is not None
    y = x.detach().requires_grad_()
    (y * 2).sin().exp().sum().backward()
    assert torch.equal(x.grad, y.grad)
    before = checkpointing.statistics.checkpoints
    with torch.no_grad():
        checkpointing(torch.sin, x)
    assert checkpointing.statistics.checkpoints == before


def test_an_input_changed_in_place_is_reported() -> None:
    x = torch.ones(3, requires_grad=True) * 1.0
    out = Checkpointing()(lambda t: t.exp(), x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()


def test_a_function_that_writes_into_its_input_is_recomputed_from_what_it_was_given() -> None:
    checkpointing = Checkpointing(CheckpointingConfig(contiguous=True, num_checkpoints=1))
    x = torch.full((3,), 0.5, requires_grad=True)
    out = checkpointing(lambda t: t.mul_(2).exp(), x * 1.0)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * torch.ones(3).exp())


def test_autocast_holds_in_the_recomputation() -> None:
    linear = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = Checkpointing()(linear, torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": True}, "pass their process group"),
        ({"contiguous": True}, "num_checkpoints"),
        ({"num_checkpoints": 0}, "num_checkpoints=0"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointingConfig(**options)
