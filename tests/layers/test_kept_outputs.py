"""Selective recomputation: the gradients of the plain call, and what is computed twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ds_zero
from ds_layers import Checkpointing, CheckpointingConfig
from harness import ranks

DIM, TOKENS = 32, 64


class Block(nn.Module):
    def __init__(self, checkpointing: Checkpointing | None = None) -> None:
        super().__init__()
        self.qkv, self.up, self.down = (
            nn.Linear(DIM, 3 * DIM),
            nn.Linear(DIM, 4 * DIM),
            nn.Linear(4 * DIM, DIM),
        )
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        return self._layer(x) if self.checkpointing is None else self.checkpointing(self._layer, x)

    def _layer(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(1, TOKENS, 2, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(
            1, TOKENS, DIM
        )
        hidden = F.dropout(F.gelu(self.up(x)), 0.2, self.training)
        out: Tensor = x + self.down(hidden)
        return out


class Calls(TorchDispatchMode):
    """Counts the calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def trained(config: CheckpointingConfig | None) -> tuple[list[Tensor], Counter[str]]:
    torch.manual_seed(0)
    checkpointing = None if config is None else Checkpointing(config)
    model = nn.Sequential(*(Block(checkpointing) for _ in range(2)))
    x = torch.randn(1, TOKENS, DIM, requires_grad=True)
    torch.manual_seed(1)
    with Calls() as calls:
        model(x).square().mean().backward()
    grads = [p.grad for p in (x, *model.parameters())]
    assert all(grad is not None for grad in grads)
    return grads, calls.of  # type: ignore[return-value]


ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("keep", "products", "attentions", "gelus"),
    [
        ((), 12, 4, 4),
        (("matmuls",), 6, 4, 4),
        (("attention",), 12, 2, 4),
        (("matmuls", "attention"), 6, 2, 4),
        (("aten::gelu",), 12, 4, 2),
        (lambda name, calls: name == "aten::addmm" and calls == 0, 10, 4, 4),
    ],
)
@pytest.mark.parametrize("contiguous", [False, True])
def test_what_is_kept_is_not_computed_again(
    keep: Any, products: int, attentions: int, gelus: int, contiguous: bool
) -> None:
    expected, once = trained(None)
    assert (once["aten::addmm"], once[ATTENTION], once["aten::gelu"]) == (6, 2, 2)
    config = CheckpointingConfig(keep_outputs=keep, contiguous=contiguous, num_checkpoints=2)
    grads, calls = trained(config)
    assert all(torch.equal(a, b) for a, b in zip(expected, grads, strict=True))
    # The last operators of a layer are not computed again if nothing behind them needs their outputs.
    assert products - 2 <= calls["aten::addmm"] <= products
    assert (calls[ATTENTION], calls["aten::gelu"]) == (attentions, gelus)


def test_a_plan_counts_what_is_kept() -> None:
    kept = {}
    for keep in ((), ("matmuls",)):
        checkpointing = Checkpointing(CheckpointingConfig(keep_outputs=keep))
        plan = ds_zero.plan(
            lambda of=checkpointing: nn.Sequential(*(Block(of) for _ in range(4))),
            torch.zeros(1, TOKENS, DIM),
            loss=lambda y: y.square().mean(),
            stage=0,
            device="cpu",
        )
        kept[keep] = max(phase.parts.get("activations", 0) for phase in plan.phases)
    outputs = 4 * TOKENS * (3 + 4 + 1) * DIM * 4  # of the three products of four layers
    assert kept["matmuls",] - kept[()] == pytest.approx(outputs, rel=0.35)


def test_a_layer_that_is_called_twice_under_autocast() -> None:
    grads = []
    for keep in (None, ("matmuls",)):
        torch.manual_seed(0)
        checkpointing = None if keep is None else Checkpointing(CheckpointingConfig(keep_outputs=keep))
        block = Block(checkpointing).eval()
        x = torch.randn(1, TOKENS, DIM, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = block(block(x)).float()
            assert torch.is_autocast_cache_enabled()
        out.square().mean().backward()
        grads.append([p.grad for p in (x, *block.parameters())])
    for plain, kept in zip(*grads, strict=True):
        assert plain is not None and kept is not None
        # Without a cache the gradients of both casts are added in fp32 instead of bf16.
        torch.testing.assert_close(plain, kept, rtol=0.02, atol=1e-4)


@ranks(2)
def test_with_parameters_that_are_gathered() -> None:
    losses = []
    for keep in (None, ("matmuls", "attention")):
        torch.manual_seed(0)
        checkpointing = None if keep is None else Checkpointing(CheckpointingConfig(keep_outputs=keep))
        model = nn.Sequential(*(Block(checkpointing) for _ in range(2)))
        adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = ds_zero.ZeroConfig(persistence_threshold_numel=0)
        model, optimizer = ds_zero.shard(model, adam, stage=3, config=config)
        torch.manual_seed(1)
        own = []
        for step in range(3):
            x = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            own.append(loss.item())
        losses.append(own)
        ds_zero.destroy(model)
    assert losses[0] == losses[1]


def test_a_second_backward_is_refused() -> None:
    block = Block(Checkpointing(CheckpointingConfig(keep_outputs=("matmuls",))))
    out = block(torch.randn(1, TOKENS, DIM, requires_grad=True)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward an extra time"):
        out.backward()


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (("aten::mn",), "no operator 'aten::mn'"),
        (("matmul",), "no operator 'matmul'"),
        ("matmuls", "a list of names"),
    ],
)
def test_names_that_no_operator_has(keep: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CheckpointingConfig(keep_outputs=keep)
