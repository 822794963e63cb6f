"""Lean operations say what torch's own fake tensors say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import ds_zero
from ds_zero.predict.fake_ops import LeanOperations
from ds_zero.predict.plan import default_loss
from ds_zero.predict.simulate import Job, Outcome, optimizer_states, simulate
from zero.planned import Gpt

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

SMALL: dict[str, Any] = {"vocab_size": 64, "use_cache": False}


def gpt() -> nn.Module:
    return Gpt(64, 3)


def recomputing() -> nn.Module:
    return Gpt(64, 3, recompute=True, tied=True)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=3, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, **SMALL
        )
    )


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SMALL,
    )
    model = transformers.LlamaForCausalLM(config)
    model.gradient_checkpointing_enable()
    return model


def t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, **SMALL
    )
    return transformers.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        **SMALL,
    )
    return transformers.MixtralForCausalLM(config)


def outcome(
    make: Callable[[], nn.Module], inputs: Mapping[str, Any] | tuple[Any, ...], lean: bool, **options: Any
) -> Outcome:
    with torch.device("meta"):
        model = make().train()
    given: dict[str, Any] = {
        "stage": 3,
        "num_ranks": 4,
        "config": ds_zero.ZeroConfig(param_dtype=torch.bfloat16),
        "accumulation_steps": 2,
        "device": torch.device("cpu"),
    }
    job = Job(
        micro_batch=inputs,
        loss=default_loss,
        optimizer=torch.optim.AdamW,
        states=optimizer_states(model, torch.optim.AdamW),
        **given | options,
    )
    return simulate(model, job, lean=lean)


def same(make: Callable[[], nn.Module], inputs: Any, **options: Any) -> None:
    lean, full = (outcome(make, inputs, lean, **options) for lean in (True, False))
    assert (
        lean.sent_bytes == full.sent_bytes and lean.resting == full.resting and lean.guesses == full.guesses
    )
    for name, phase in full.phases.items():
        for place in ("device", "host", "both"):
            found, wanted = getattr(lean.phases[name], place), getattr(phase, place)
            assert (found.num_bytes, found.parts) == (wanted.num_bytes, wanted.parts), (name, place)


TOKENS = torch.zeros(2, 8, dtype=torch.long)
LABELLED = {"input_ids": TOKENS, "labels": TOKENS}


@pytest.mark.parametrize("make", [recomputing, llama])
def test_all_phases_are_the_same_to_the_byte(make: Callable[[], nn.Module]) -> None:
    same(make, LABELLED if make is llama else (TOKENS, TOKENS))


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("make", [gpt, gpt2, llama, t5, mixtral])
def test_all_models_are_the_same(make: Callable[[], nn.Module], stage: int) -> None:
    inputs = (TOKENS, TOKENS) if make is gpt else LABELLED
    same(make, inputs, stage=stage, checkpointing=make is gpt)


@pytest.mark.full
def test_accelerators_and_offload_are_the_same() -> None:
    same(llama, LABELLED, device=torch.device("cuda"), offload=frozenset(["master", "grad"]))


def test_torch_runs_few_operations_itself() -> None:
    class Counting(LeanOperations):
        lean = others = 0

        def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
            result = super().__call__(func, args, kwargs)
            Counting.lean += result is not NotImplemented
            Counting.others += result is NotImplemented
            return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_zero.predict.simulate.LeanOperations", Counting)
        outcome(llama, LABELLED, True)
    assert Counting.lean > 8 * Counting.others > 0
