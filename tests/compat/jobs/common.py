"""Models and data that the jobs share: tiny transformers with random weights, on the text of a module of Python."""

from __future__ import annotations

import os

import torch

VOCABULARY, LENGTH = 64, 32


def model(name: str) -> torch.nn.Module:
    """gpt2, llama or t5, the same weights everywhere."""
    import transformers as hf

    torch.manual_seed(0)
    if name == "gpt2":
        config = hf.GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=48, n_layer=2, n_head=2)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return hf.GPT2LMHeadModel(config)
    if name == "llama":
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=48,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
            )
        )
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=48,
            d_ff=96,
            d_kv=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    """Consecutive pieces of the source of `os`."""
    with open(os.__file__, "rb") as file:
        text = file.read(count * LENGTH)
    rows = torch.tensor([byte % VOCABULARY for byte in text]).view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def zero(stage: int) -> dict[str, object]:
    """The section zero_optimization; small models would stay whole on every rank without the threshold."""
    return {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
