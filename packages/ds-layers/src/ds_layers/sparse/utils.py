"""Helpers for models that are given block-sparse attention: longer position embeddings, and whole blocks of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class SparseAttentionUtils:
    """DeepSpeed's helpers of this name."""

    @staticmethod
    def extend_position_embedding(model: nn.Module, max_position: int) -> nn.Module:
        """Repeats the learned position embeddings of a model of Transformers (BERT, RoBERTa, GPT-2), in place, until
        there are `max_position`, and returns the model.

        Raises:
            ValueError: the model has no `position_embeddings` or `wpe`, or more positions already.
        """
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
                break
        else:
            raise ValueError(f"{type(model).__name__} has no learned position embeddings to extend")
        config: Any = getattr(model, "config", None)
        # RoBERTa's positions begin after its padding index.
        reserved = 2 if getattr(config, "model_type", "") == "roberta" else 0
        old = module.weight.detach()
        if max_position + reserved <= len(old):
            raise ValueError(
                f"max_position {max_position}: the model has {len(old) - reserved} positions already"
            )
        body = old[reserved:]
        copies = -(-max_position // len(body))
        weight = torch.cat([old[:reserved], body.repeat(copies, 1)[:max_position]])
        longer = nn.Embedding(len(weight), weight.shape[1], padding_idx=module.padding_idx, _weight=weight)
        model.set_submodule(name, longer.to(old.device, old.dtype))
        if config is not None:
            config.max_position_embeddings = max_position + reserved
        for part in model.modules():
            ids = part._buffers.get("position_ids")
            if ids is not None and ids.shape[-1] < max_position:
                part.register_buffer(
                    "position_ids", torch.arange(max_position).expand(1, -1), persistent=False
                )
            kinds = part._buffers.get("token_type_ids")
            if kinds is not None and kinds.shape[-1] < max_position:
                part.register_buffer("token_type_ids", kinds.new_zeros(1, max_position), persistent=False)
        return model

    @staticmethod
    def update_tokenizer_model_max_length(tokenizer: Any, max_position: int) -> Any:
        """Sets the maximum length of a tokenizer of Transformers, and returns it."""
        tokenizer.model_max_length = max_position
        tokenizer.init_kwargs["model_max_length"] = max_position
        return tokenizer

    @staticmethod
    def pad_to_block_size(
        block_size: int,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pad_token_id: int,
        model_embeddings: nn.Module | None,
    ) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Pads a batch at the end to a multiple of the block size.

        Returns:
            (number of tokens added, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds).

        Raises:
            ValueError: neither `input_ids` nor `inputs_embeds`; embeddings without `model_embeddings`.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("pad_to_block_size: pass input_ids or inputs_embeds")
        missing = -given.shape[1] % block_size
        if not missing:
            return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        if inputs_embeds is not None:
            if model_embeddings is None:
                raise ValueError("pad_to_block_size: inputs_embeds need model_embeddings")
            ids = torch.full((len(given), missing), pad_token_id, device=given.device)
            inputs_embeds = torch.cat([inputs_embeds, model_embeddings(ids)], 1)

        def padded(x: Tensor | None, value: int) -> Tensor | None:
            return None if x is None else pad(x, (0, missing), value=value)

        return (
            missing,
            padded(input_ids, pad_token_id),
            padded(attention_mask, 0),
            padded(token_type_ids, 0),
            padded(position_ids, pad_token_id),
            inputs_embeds,
        )

    @staticmethod
    def unpad_sequence_output(pad_len: int, sequence_output: Tensor) -> Tensor:
        """Removes the tokens that `pad_to_block_size` added."""
        return sequence_output[:, :-pad_len] if pad_len else sequence_output
