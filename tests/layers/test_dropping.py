"""Tokens that pass by layers: which ones, in what order, with which masks, and with the gradients of a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_layers import DroppingConfig, TokenDropping

B, S, D, KEPT = 3, 7, 8, 4
"""Batch, tokens, width, tokens that are kept."""


class Layer(nn.Module):
    """Attention under a mask, with positions added; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.given = nn.Linear(D, 3 * D), list[tuple[Any, ...]]()

    def forward(self, hidden: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> Any:
        self.given.append((hidden, mask, position_ids))
        q, k, v = self.qkv(hidden).unsqueeze(1).chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)
        return hidden + attended, "more"


def dropping(layer: nn.Module, **config: Any) -> TokenDropping:
    made = TokenDropping([layer], DroppingConfig(mask="mask", **config))
    made.kept = KEPT
    return made


def kept_places(hidden: Tensor, part: Tensor) -> Tensor:
    """Where the rows of `part` (B, kept, D) stand in `hidden`."""
    return torch.stack(
        [(h[:, None] == p[None]).all(-1).float().argmax(0) for h, p in zip(hidden, part, strict=True)]
    )


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, S, S), (B, 1, S, S), (S, S)], ids=str)
def test_it_is_the_layer_on_the_tokens_that_are_kept(shape: tuple[int, ...], by_name: bool) -> None:
    torch.manual_seed(0)
    layer, hidden = Layer(), torch.randn(B, S, D, requires_grad=True)
    mask = torch.ones(S, S, dtype=torch.bool).tril().expand(shape)
    positions = torch.arange(S)[None]
    made = dropping(layer)
    if by_name:
        out, more = layer(hidden=hidden, mask=mask, position_ids=positions)
    else:
        out, more = layer(hidden, mask, positions)
    part, part_mask, part_positions = layer.given[0]
    places = kept_places(hidden, part)
    assert more == "more" and part.shape == (B, KEPT, D) and (places.diff(dim=1) > 0).all()
    assert torch.equal(part_positions, places)
    assert torch.equal(part_mask, torch.ones(KEPT, KEPT, dtype=torch.bool).tril().expand(B, 1, -1, -1))
    out.square().sum().backward()
    grads = [hidden.grad, layer.qkv.weight.grad.clone()]

    made.remove()
    layer.zero_grad()
    again = hidden.detach().clone().requires_grad_()
    for row, place in enumerate(places):
        whole = again[row].clone()
        one, _ = layer(again[row, place][None], torch.ones(KEPT, KEPT, dtype=torch.bool).tril())
        whole = whole.index_copy(0, place, one[0])
        assert torch.allclose(out[row], whole, atol=1e-6)
        whole.square().sum().backward()
    assert torch.allclose(grads[0], again.grad, atol=1e-5)
    assert torch.allclose(grads[1], layer.qkv.weight.grad, atol=1e-5)


class Keeps(nn.Module):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        self.given = (hidden, mask)
        return hidden


@pytest.mark.parametrize("shape", [(B, S), (B, 1, S), (B, 1, 1, S)], ids=str)
def test_padding_goes_with_its_tokens(shape: tuple[int, ...]) -> None:
    layer, hidden = Keeps(), torch.randn(B, S, D)
    real = torch.arange(S)[None] < torch.tensor([[3], [5], [7]])
    dropping(layer)
    layer(hidden, real.view(shape))
    part, mask = layer.given
    assert torch.equal(mask.view(B, KEPT), real.gather(1, kept_places(hidden, part)))


def test_tokens_first() -> None:
    layer, hidden = nn.Linear(D, D), torch.randn(S, B, D)
    made = TokenDropping([layer], DroppingConfig(batch_first=False))
    made.kept = KEPT
    out = layer(hidden)
    same = (out == hidden).all(-1)
    assert out.shape == hidden.shape and (same.sum(0) == S - KEPT).all()


def test_every_token_and_sequence_has_its_turn() -> None:
    torch.manual_seed(0)
    layer, hidden = nn.Linear(D, D), torch.randn(2, S, D)
    made = TokenDropping([layer])
    made.kept = KEPT
    kept = sum((layer(hidden) != hidden).all(-1).float() for _ in range(700))
    assert (abs(kept - 400) < 6 * 13.1).all(), kept  # six standard deviations of a binomial count


def test_all_tokens_outside_of_training_and_where_there_are_no_more() -> None:
    layer, hidden = nn.Linear(D, D), torch.randn(B, S, D)
    whole = layer(hidden)
    made = TokenDropping([layer])
    assert torch.equal(layer(hidden), whole), "nobody has said how many"
    for kept in (S, S + 1):
        made.kept = kept
        assert torch.equal(layer(hidden), whole)
    made.kept = KEPT
    assert not torch.equal(layer(hidden), whole)
    layer.eval()
    assert torch.equal(layer(hidden), whole)
    layer.train()
    made.remove()
    assert torch.equal(layer(hidden), whole)


def test_recomputation_keeps_the_same_tokens() -> None:
    torch.manual_seed(0)
    layer, hidden = nn.Linear(D, D), torch.randn(B, S, D, requires_grad=True)
    made = TokenDropping([layer])
    made.kept = KEPT
    out = checkpoint(layer, hidden, use_reentrant=False)
    passed = (out == hidden).all(-1)
    out.sum().backward()
    assert hidden.grad is not None
    assert torch.equal((hidden.grad == 1).all(-1), passed)


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    class Fails(nn.Module):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError("no")
            return 2 * x

    layer, hidden = Fails(), torch.randn(B, S, D)
    made = TokenDropping([layer])
    made.kept = KEPT
    with pytest.raises(RuntimeError, match="no"):
        layer(hidden)
    layer.fails, made.kept = False, None
    assert torch.equal(layer(hidden), 2 * hidden)


def test_what_cannot_be_dropped() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        TokenDropping([])
    layer = Layer()
    dropping(layer)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 3\), but sequences have 7 tokens"):
        layer(torch.randn(B, S, D), torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"ambiguous: \(batch, tokens\) or \(tokens, tokens\)"):
        layer(torch.randn(S, S, D), torch.ones(S, S))
