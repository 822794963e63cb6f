"""TiledLinear shows the tiles that DeepSpeed's is made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepspeed


@pytest.mark.parametrize(("in_splits", "out_splits"), [(1, 1), (3, 4), (5, 2)])
def test_tiles_are_views_of_the_one_weight(in_splits: int, out_splits: int) -> None:
    base = nn.Linear(17, 23)
    layer = deepspeed.zero.TiledLinear(17, 23, in_splits=in_splits, out_splits=out_splits, init_linear=base)
    tiles = layer.linears
    assert (len(tiles), len(tiles[0])) == (out_splits, in_splits)
    assert torch.equal(torch.cat([torch.cat([t.weight for t in row], 1) for row in tiles]), base.weight)
    assert all(tile.bias is None for row in tiles for tile in row[:-1])
    assert torch.equal(torch.cat([row[-1].bias for row in tiles]), base.bias)
    x = torch.randn(2, 17)
    parts = [x[:, a:b] for a, b in zip(layer.in_parts, layer.in_parts[1:], strict=False)]
    rows = [sum(tile(part) for tile, part in zip(row, parts, strict=True)) for row in tiles]
    assert torch.allclose(torch.cat(rows, 1), base(x), atol=1e-6)


def test_a_tile_shows_its_part_of_the_gradient_and_takes_values() -> None:
    layer = deepspeed.zero.TiledLinear(6, 4, in_splits=2, out_splits=2)
    layer(torch.ones(1, 6)).sum().backward()
    tile = layer.linears[1][0]
    assert tile.weight.grad is not None and torch.equal(tile.weight.grad, torch.ones(2, 3))
    with torch.no_grad():
        tile.weight.fill_(7.0)
    assert torch.equal(layer.weight[2:, :3], torch.full((2, 3), 7.0))
    assert len(list(layer.parameters())) == 2
