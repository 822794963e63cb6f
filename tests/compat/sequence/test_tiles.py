"""Functions of single tokens over one part of the sequence at a time, under DeepSpeed's names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import (
    TiledFusedLogitsLoss,
    TiledMLP,
    sequence_tiled_compute,
)
from torch import Tensor, nn

import deepspeed
from compat.engine.test_engine import config
from harness import ranks


class Mlp(nn.Sequential):
    """An MLP whose forward code replaces."""

    def __init__(self, way: Callable[[Mlp, Tensor], Tensor] | None) -> None:
        super().__init__(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.way = way

    def plain(self, x: Tensor) -> Tensor:
        hidden: Tensor = super().forward(x)
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) if self.way is None else self.way(self, x)


def _tiled(mlp: Mlp, x: Tensor) -> Tensor:
    return TiledMLP.apply(lambda mlp, x: mlp.plain(x), mlp, x, 3, list(mlp.parameters()))


def _generic(mlp: Mlp, x: Tensor) -> Tensor:
    return sequence_tiled_compute(
        lambda mlp, x: mlp.plain(x),
        x.shape[1],
        3,
        {"x": x},
        {"mlp": mlp},
        "x",
        list(mlp.parameters()),
        1,
        None,
    )


@ranks(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_training_with_tiles_is_training(stage: int) -> None:
    losses = []
    for way in (None, _tiled, _generic):
        torch.manual_seed(0)
        model = nn.Sequential(Mlp(way), Mlp(way), nn.Linear(8, 2))
        engine = deepspeed.initialize(model=model, config=config(stage))[0]
        for step in range(3):
            torch.manual_seed(step)
            loss = engine(torch.randn(4, 7, 8)).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        engine.destroy()
    assert losses[:3] == pytest.approx(losses[3:6], rel=1e-5)
    assert losses[:3] == pytest.approx(losses[6:], rel=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_whose_logits_never_exist_at_once(masked: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 20)
    x, y = torch.randn(2, 9, 8, requires_grad=True), torch.randint(0, 20, (2, 9))
    mask = torch.rand(2, 9) > 0.4 if masked else None
    tokens: list[int] = []

    def loss(head: nn.Linear, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens.append(x.shape[1])
        each = nn.functional.cross_entropy(head(x).flatten(0, 1), y.flatten(), reduction="none")
        return (each if mask is None else each * mask.flatten()).sum()

    loss(head, x, y, mask).backward()
    expected = [head.weight.grad, x.grad]
    head.zero_grad()
    x.grad = None
    TiledFusedLogitsLoss.apply(loss, head, x, y, mask, 4, [head.weight], "sum").backward()
    assert max(tokens[1:]) == 3
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, [head.weight.grad, x.grad], strict=True)
    )
    mean = TiledFusedLogitsLoss.apply(loss, head, x, y, mask, 3, [head.weight], "mean")
    assert torch.allclose(mean, loss(head, x, y, mask) / 3)
    with pytest.raises(ValueError, match="must be 'mean' or 'sum'"):
        TiledFusedLogitsLoss.apply(loss, head, x, y, mask, 3, [], "max")
    with pytest.raises(ValueError, match="seqlen is 4"):
        sequence_tiled_compute(lambda x: x, 4, 2, {"x": x}, {}, "x")
