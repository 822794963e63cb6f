"""Functions over one part of the sequence at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ds_layers import tiled_loss, tiled_over_sequence


class Mlp(nn.Module):
    """An MLP that notes how many tokens it sees at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[-2])
        hidden: Tensor = self.down(torch.relu(self.up(x)))
        return hidden


@pytest.mark.parametrize("tiles", [1, 3, 4, 99])
def test_values_and_gradients_are_those_of_the_whole_sequence(tiles: int) -> None:
    torch.manual_seed(0)
    mlp = Mlp()
    x = torch.randn(2, 10, 6, requires_grad=True)
    mlp(x).square().sum().backward()
    expected = [p.grad for p in (x, *mlp.parameters())]
    mlp.zero_grad()
    x.grad, mlp.seen = None, []
    tiled = tiled_over_sequence(mlp, x, tiles)
    assert torch.allclose(tiled, mlp(x), atol=1e-6)
    mlp.seen.pop()
    forward = len(mlp.seen)
    assert sum(mlp.seen) == 10 and max(mlp.seen) == -(-10 // min(tiles, 10))
    tiled.square().sum().backward()
    assert len(mlp.seen) == 2 * forward  # every part once more
    for parameter, grad in zip((x, *mlp.parameters()), expected, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-4)


def test_without_gradients_nothing_is_computed_twice() -> None:
    mlp = Mlp()
    with torch.no_grad():
        assert tiled_over_sequence(mlp, torch.randn(1, 8, 6), 2).shape == (1, 8, 6)
    assert mlp.seen == [4, 4]
    with pytest.raises(ValueError, match="num_tiles is 0"):
        tiled_over_sequence(mlp, torch.randn(1, 8, 6), 0)


def test_a_loss_over_parts_of_several_tensors() -> None:
    hidden, labels = torch.randn(2, 10, 6, requires_grad=True), torch.randn(2, 10)

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return (hidden.view(-1, 6).sum(-1) - labels.view(-1)).square().sum()  # as losses do

    loss(hidden, labels).backward()
    expected, hidden.grad = hidden.grad, None
    total = tiled_loss(loss, hidden, labels, num_tiles=3, reduction="sum")
    total.backward()
    assert torch.allclose(total, loss(hidden, labels)) and torch.allclose(hidden.grad, expected)
    assert torch.allclose(tiled_loss(loss, hidden, labels, num_tiles=5), loss(hidden, labels) / 5)
    with pytest.raises(ValueError, match=r"\[10, 9\] tokens"):
        tiled_loss(loss, hidden, labels[:, :9], num_tiles=2)
