"""Models of Hugging Face's transformers with random weights: the same training as plain PyTorch, at every stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from harness import ranks

pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

SMALL = {"vocab_size": 64, "attn_implementation": "eager"}


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **SMALL
    )


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **SMALL,
    )


def _t5() -> Any:
    from transformers import T5Config

    return T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0,
        decoder_start_token_id=0,
        **SMALL,
    )


def _mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        output_router_logits=True,
        **SMALL,
    )


CONFIGS: dict[str, Callable[[], Any]] = {"gpt2": _gpt2, "llama": _llama, "t5": _t5, "mixtral": _mixtral}


def build(name: str, checkpointing: bool | None = None) -> nn.Module:
    """`checkpointing`: None for none, else whether it is reentrant."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = CONFIGS[name]()
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model: nn.Module = auto.from_config(config)
    if checkpointing is not None:
        model.config.use_cache = False  # type: ignore[union-attr]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    return model


def batch(step: int, rank: int) -> Tensor:
    return torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens, labels=tokens).loss
    return found


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)


STEPS = 3


def plain(
    name: str, size: int, checkpointing: bool | None = None
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The losses of every rank, and the weights after the last step; gradients averaged as the tree does on two."""
    model = build(name, checkpointing)
    optimizer = optimizer_of(model)
    losses: list[list[float]] = []
    for step in range(STEPS):
        grads, row = [], []
        for rank in range(size):
            loss = loss_of(model, batch(step, rank))
            loss.backward()
            grads.append([p.grad for p in model.parameters()])
            row.append(loss.item())
            model.zero_grad()
        for p, *parts in zip(model.parameters(), *grads, strict=True):
            found = [g for g in parts if g is not None]
            p.grad = sum(found[1:], found[0]) / size if found else None
        losses.append(row)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


@ranks(2, timeout_s=180)
@pytest.mark.parametrize(
    "name, stage, checkpointing",
    [
        ("gpt2", 3, None),
        ("gpt2", 1, True),
        ("llama", 3, False),
        ("t5", 3, None),
        ("mixtral", 3, None),
        ("mixtral", 2, False),
        *(
            pytest.param(name, stage, reentrant, marks=pytest.mark.full)
            for name in ("gpt2", "llama", "t5", "mixtral")
            for stage in (0, 1, 2, 3)
            for reentrant in (None, False, True)
        ),
    ],
)
def test_trains_as_plain_pytorch(name: str, stage: int, checkpointing: bool | None) -> None:
    """Losses of both ranks and all weights, bitwise."""
    losses, weights = plain(name, 2, checkpointing)
    model = build(name, checkpointing)
    optimizer = optimizer_of(model)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0, order_timeout_s=10)
    ds_zero.shard(model, optimizer, stage, config=config)
    rank = dist.get_rank()
    for step in range(STEPS):
        loss = loss_of(model, batch(step, rank))
        loss.backward()
        assert loss.item() == losses[step][rank]
        optimizer.step()
        optimizer.zero_grad()
    found = ds_zero.full_state_dict(model)
    if rank == 0:
        assert [n for n, value in weights.items() if not torch.equal(found[n], value)] == []


@ranks(2, timeout_s=120)
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generates_as_plain_pytorch(name: str) -> None:
    """Between steps, on ranks that generate alike."""
    reference, model = build(name).eval(), build(name).eval()
    optimizer = optimizer_of(model)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for _ in range(2):
        expected, found = (m.generate(batch(0, 0), **options) for m in (reference, model))  # type: ignore[operator]
        assert torch.equal(found, expected)
        assert ds_zero.memory(model, optimizer).gathered_bytes == 0


@ranks(2, timeout_s=120)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "mixtral"])
def test_deferred_construction_gives_the_ordinary_weights(name: str) -> None:
    ordinary = build(name)
    with ds_zero.deferred_init(stage=3):
        model = build(name)
    assert all(p.device.type == "meta" for p in model.parameters())
    ds_zero.shard(model, optimizer_of(model), 3)
    found = ds_zero.full_state_dict(model)
    if dist.get_rank() == 0:
        expected = ordinary.state_dict()
        assert [n for n in expected if not torch.equal(found[n], expected[n])] == []
    loss = loss_of(model, batch(0, 0))
    assert loss.item() == loss_of(ordinary, batch(0, 0)).item()
