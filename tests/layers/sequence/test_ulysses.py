"""Attention over the sequence of several ranks: Ulysses, rings, and both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_layers import DistributedAttention, RingAttention, SequenceLayout, Ulysses, sdpa
from ds_layers.attention import blocks
from ds_layers.sequence.head_plan import plan_heads
from ds_layers.sequence.transformers import groups_of
from harness import ranks

B, N, D = 2, 16, 8


def whole(heads: int, kv: int, tokens: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * 100 + kv)
    return [torch.randn(B, tokens, h, D, generator=generator).to(dtype) for h in (heads, kv, kv, heads)]


def reference(tensors: list[Tensor], causal: bool, scale: float | None = None) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in tensors[:3])
    out = sdpa(q, k, v, causal=causal, scale=scale)
    out.backward(tensors[3])
    return [out.detach(), *(x.grad for x in (q, k, v))]  # type: ignore[list-item]


def parallel(
    attention: Any, tensors: list[Tensor], index: Tensor, causal: bool, scale: float | None = None
) -> list[Tensor]:
    q, k, v = (x[:, index].clone().requires_grad_() for x in tensors[:3])
    out = attention(q, k, v, causal=causal, scale=scale)
    out.backward(tensors[3][:, index])
    return [out.detach(), *(x.grad for x in (q, k, v))]  # type: ignore[list-item]


def tokens_of(layout: SequenceLayout, rank: int, tokens: int = N) -> Tensor:
    return torch.cat([torch.arange(low, high) for low, high in layout.ranges(rank, tokens)])


@ranks(4, groups_may_stay=True)
def test_outputs_and_gradients_are_those_of_one_rank() -> None:
    rank = dist.get_rank()
    plain = SequenceLayout(size=4)
    pair = dist.new_subgroups(2)[0]
    kinds: list[tuple[Any, SequenceLayout, bool]] = [
        (Ulysses(), plain, True),
        (RingAttention(), plain, False),
        (RingAttention(order="zigzag"), SequenceLayout(size=4, ring=4, order="zigzag"), False),
    ]
    mixed = SequenceLayout(size=4, ring=2, order="zigzag")
    within, around = groups_of(dist.group.WORLD, mixed)
    kinds.append((Ulysses(within, RingAttention(around, order="zigzag")), mixed, True))
    for attention, layout, needs_heads in kinds:
        for heads, kv in ((4, 4), (8, 2), (6, 3), (7, 7), (2, 1)):
            if needs_heads and heads < 4:
                continue
            for causal, scale in ((True, None), (False, 0.3)):
                tensors = whole(heads, kv)
                index = tokens_of(layout, rank)
                expected = reference(tensors, causal, scale)
                for got, want in zip(
                    parallel(attention, tensors, index, causal, scale), expected, strict=True
                ):
                    torch.testing.assert_close(got, want[:, index], atol=3e-6, rtol=1e-5)
    # bf16, and two groups of two ranks
    tensors = whole(4, 2, dtype=torch.bfloat16)
    index = tokens_of(SequenceLayout(size=2), rank % 2)
    for attention in (Ulysses(pair), RingAttention(pair)):
        for got, want in zip(
            parallel(attention, tensors, index, True), reference(tensors, True), strict=True
        ):
            torch.testing.assert_close(got, want[:, index], atol=0.03, rtol=0.03)
    with pytest.raises(ValueError, match="2 heads for 4 sequence-parallel ranks"):
        Ulysses()(*(x[:, :4] for x in whole(2, 2)[:3]))


@ranks(4)
def test_ulysses_sends_what_the_formula_says() -> None:
    for heads, kv in ((8, 8), (8, 4), (16, 4)):
        attention = Ulysses()
        q, k, v = (x[:, :4].clone().requires_grad_() for x in whole(heads, kv)[:3])
        out = attention(q, k, v, causal=True)
        formula = (2 + 2 * kv / heads) * (B * N) * heads * D * (4 - 1) / 4**2
        assert attention.traffic.elements == pytest.approx(formula, rel=0.02)
        assert attention.traffic.messages == 2
        out.sum().backward()
        assert attention.traffic.elements == pytest.approx(2 * formula, rel=0.02)
        assert attention.traffic.sent_bytes == 4 * attention.traffic.elements


@ranks(2)
def test_distributed_attention_in_both_layouts_and_what_it_refuses() -> None:
    rank = dist.get_rank()
    tensors = whole(4, 4)
    expected = reference(tensors, True)
    index = tokens_of(SequenceLayout(size=2), rank)

    class Local(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, *, tokens_first: bool) -> Tensor:
            swap = (lambda x: x.transpose(0, 1)) if tokens_first else (lambda x: x)
            return swap(sdpa(swap(q), swap(k), swap(v), causal=causal))

    for gather_idx in (0, 1):
        module = DistributedAttention(Local(), dist.group.WORLD, 2, gather_idx)

        def called(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None) -> Tensor:
            if gather_idx:  # noqa: B023
                return module(q, k, v, causal, tokens_first=False)  # type: ignore[no-any-return] # noqa: B023
            out = module(*(x.transpose(0, 1) for x in (q, k, v)), causal, tokens_first=True)  # noqa: B023
            return out.transpose(0, 1)  # type: ignore[no-any-return]

        for got, want in zip(parallel(called, tensors, index, True), expected, strict=True):
            torch.testing.assert_close(got, want[:, index], atol=3e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="the same 2 ranks already"):
        DistributedAttention(module)
    with pytest.raises(ValueError, match="scatter_idx=1"):
        DistributedAttention(Local(), None, 1, 0)
    # Other numbers of tokens: refused on every rank, or exchanged.
    own = [x[:, :7] if rank == 0 else x[:, 7:] for x in tensors]
    for sequence in (Ulysses(), RingAttention()):
        sequence(*(x[:, index] for x in tensors[:3]))
        with pytest.raises(ValueError, match=r"\[7, 9\] tokens"):
            sequence(*own[:3])
        with pytest.raises(ValueError, match=r"\[1, 2\] samples"):
            sequence(*(x[: 1 + rank, index] for x in tensors[:3]))
    attention = Ulysses(uneven_tokens=True)
    uneven = torch.arange(7) if rank == 0 else torch.arange(7, N)
    for got, want in zip(parallel(attention, tensors, uneven, True), expected, strict=True):
        torch.testing.assert_close(got, want[:, uneven], atol=3e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="zigzag order needs two equal parts"):
        RingAttention(order="zigzag")(*(x[:, :7] for x in tensors[:3]))


def test_heads_are_divided_so_that_each_rank_gets_the_keys_of_its_queries() -> None:
    plan = plan_heads(10, 5, 4)
    assert plan.queries == ((0, 3), (3, 6), (6, 8), (8, 10))
    assert plan.keys == ((0, 2), (1, 3), (3, 4), (4, 5))
    assert plan.expansion(0) == [0, 0, 1] and plan.expansion(1) == [0, 1, 1] and plan.expansion(2) is None
    assert plan.sent_heads(0) == (7, 4)
    with pytest.raises(ValueError, match="6 query heads cannot share 4 key heads"):
        plan_heads(6, 4, 2)


def test_the_blocks_of_other_devices_are_those_of_the_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, grad = (x.transpose(1, 2).contiguous() for x in whole(2, 2))
    fast = blocks.attend(q, k, v, causal=True, scale=0.2)
    fast_grads = blocks.attend_backward(grad, q, k, v, *fast, causal=True, scale=0.2)
    monkeypatch.setattr(blocks, "_has_cpu_kernel", lambda *_: False)
    slow = blocks.attend(q, k, v, causal=True, scale=0.2)
    slow_grads = blocks.attend_backward(grad, q, k, v, *slow, causal=True, scale=0.2)
    for got, want in zip((*fast, *fast_grads), (*slow, *slow_grads), strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_a_layout_divides_every_token_once_and_balances_causal_work() -> None:
    for size, ring, order in ((4, 1, "contiguous"), (4, 4, "zigzag"), (6, 3, "zigzag"), (6, 2, "contiguous")):
        layout = SequenceLayout(size=size, ring=ring, order=order)  # type: ignore[arg-type]
        tokens = layout.padded(37)
        parts = [tokens_of(layout, rank, tokens) for rank in range(size)]
        assert torch.cat(parts).sort().values.tolist() == list(range(tokens))
        assert {len(part) for part in parts} == {tokens // size}
        if order == "zigzag":  # attention of position i to i + 1 keys
            places = [torch.cat(parts[i : i + size // ring]) for i in range(0, size, size // ring)]
            assert len({int((place + 1).sum()) for place in places}) == 1
    with pytest.raises(ValueError, match="37 tokens cannot be divided among 4 ranks: pad them to 40"):
        SequenceLayout(size=4).ranges(0, 37)
    with pytest.raises(ValueError, match="3 ranks of a ring do not divide 4"):
        SequenceLayout(size=4, ring=3)
