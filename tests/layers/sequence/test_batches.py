"""Batches of whole sequences become this rank's tokens; losses over them; packed and padded sequences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_layers import (
    SequenceBatches,
    SequenceLayout,
    SequenceParallelAttention,
    divide_batch,
    mean_over_tokens,
    sdpa,
    sequence_parallel_cross_entropy,
)
from harness import ranks


def batch(rank: int, tokens: int = 5) -> dict[str, Any]:
    ids = torch.arange(tokens).unsqueeze(0) + 100 * rank
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "attention_mask": torch.ones_like(ids),
        "name": f"b{rank}",
    }


def test_labels_are_shifted_before_the_division_and_padding_has_none() -> None:
    layout = SequenceLayout(size=2)
    first, second = (divide_batch(batch(0), layout, rank, pad_token=7) for rank in range(2))
    assert first["input_ids"].tolist() == [[0, 1, 2]] and second["input_ids"].tolist() == [[3, 4, 7]]
    assert first["shift_labels"].tolist() == [[1, 2, 3]]
    assert second["shift_labels"].tolist() == [[4, -100, -100]]
    assert second["position_ids"].tolist() == [[3, 4, 5]] and second["attention_mask"].tolist() == [[1, 1, 0]]
    assert first["name"] == "b0" and "labels" not in first
    with pytest.raises(ValueError, match="positions 3 to 5, 3 tokens: the sequence was divided already"):
        divide_batch(second, layout, 0)
    with pytest.raises(ValueError, match="it was divided already"):
        divide_batch(first, layout, 0)
    with pytest.raises(ValueError, match="must have input_ids"):
        divide_batch({"pixels": torch.ones(1)}, layout, 0)
    zigzag = SequenceLayout(size=2, ring=2, order="zigzag")
    assert divide_batch(batch(0, 8), zigzag, 0)["input_ids"].tolist() == [[0, 1, 6, 7]]


@ranks(2)
def test_ranks_process_the_batches_of_each_together() -> None:
    rank = dist.get_rank()
    loader = SequenceBatches([batch(rank), batch(rank + 2, 8)])
    assert len(loader) == 4
    got = list(loader)
    assert [part["name"] for part in got] == ["b0", "b1", "b2", "b3"]
    assert got[1]["input_ids"].tolist() == ([[100, 101, 102]] if rank == 0 else [[103, 104, 0]])
    with pytest.raises(ValueError, match="among 2 ranks already: a sequence is divided once"):
        SequenceBatches(loader)
    # One rank has fewer batches, or fails: no rank waits for it.
    assert len(list(SequenceBatches([batch(rank)] * (1 + rank)))) == 2

    def failing() -> Any:
        yield batch(rank)
        if rank == 1:
            raise OSError("the disk is gone")
        yield batch(rank)

    with pytest.raises((RuntimeError, OSError), match="the disk is gone"):
        list(SequenceBatches(failing()))
    losses_of_unequal_parts(rank)
    masks(rank)


def losses_of_unequal_parts(rank: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 6, 11, requires_grad=True)
    labels = torch.tensor([[-100, -100, -100, 4, -100, 2]])  # the first rank has none
    torch.nn.functional.cross_entropy(logits[0], labels[0]).backward()
    own = logits.detach()[:, 3 * rank : 3 * rank + 3].requires_grad_()
    loss = sequence_parallel_cross_entropy(own, labels[:, 3 * rank : 3 * rank + 3])
    loss.backward()
    expected = logits.grad[:, 3 * rank : 3 * rank + 3] * 2  # the mean over both ranks is the gradient
    torch.testing.assert_close(own.grad, expected)
    nothing = torch.zeros((), requires_grad=True)
    mean_over_tokens(nothing * 3, 0).backward()
    assert nothing.grad.item() == 0


def masks(rank: int) -> None:
    """Packed and padded sequences, and sliding windows, as Transformers passes them."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 4, 8, 6) for _ in range(3))  # (batch, heads, tokens, head_dim)
    part = slice(4 * rank, 4 * rank + 4)
    module = SimpleNamespace(is_causal=True, training=True)
    plain = torch.arange(8).expand(2, 8)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    index = torch.arange(8)
    causal = index[:, None] >= index
    same = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0] * 8])
    documents = causal & (same[:, :, None] == same[:, None])
    window = causal & (index[:, None] - index < 3)
    padded = causal & left.bool()[:, None] | torch.eye(8, dtype=torch.bool)
    cases: list[tuple[Tensor, Tensor | None, int | None, Tensor]] = [
        (plain, None, None, causal.expand(2, 8, 8)),
        (packed, None, None, documents),
        (plain, None, 3, window.expand(2, 8, 8)),
        (plain, left, None, padded),
    ]
    attention = SequenceParallelAttention()
    for positions, keep, size, allowed in cases:
        own = positions[:, part].contiguous()
        own_keep = None if keep is None else keep[:, part].contiguous()
        got = [
            attention(
                module, *(x[:, :, part] for x in (q, k, v)), own_keep, position_ids=own, sliding_window=size
            )[0]
            for _ in range(2)  # the second layer
        ]
        want = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), mask=allowed[:, None])[:, part]
        for out in got:
            torch.testing.assert_close(out, want)
    with pytest.raises(ValueError, match="all 2 sequence-parallel ranks have the positions 0 to 3"):
        attention(module, *(x[:, :, part] for x in (q, k, v)), position_ids=torch.arange(4).expand(2, 4))
    with pytest.raises(ValueError, match="1 queries and 4 keys"):
        attention(module, q[:, :, :1], k[:, :, :4], v[:, :, :4])
