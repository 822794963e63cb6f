"""Divides an ordinary module into a list of layers, without changing it.

[Note: splitting]
An `nn.Sequential` is its list of children. A decoder in the form of Hugging Face has an embedding, a list of equal
blocks, a norm and an output layer; a block needs, besides the hidden states, only the rotary embedding of positions.
Whether a model really works like this is not guessed: `split` runs the layers on a few tokens and compares the logits
with those of the model. A model that does something else (learned positions, sliding windows) is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_pipe.model.layer_specs import Layer, TiedLayerSpec

_TOLERANCE = 1e-4


def split(model: nn.Module) -> list[Layer]:
    """Returns the layers of a model for `PipelineModule`, whose parameters they share.

    Args:
        model: an `nn.Sequential`, or a causal language model as Hugging Face's transformers have it, whose blocks see
            all earlier tokens. Its layers take token numbers and give logits, for sequences without padding.

    Raises:
        ValueError: no list of blocks is found, or the layers do not compute what the model computes.
    """
    if isinstance(model, nn.Sequential):
        return _flat(model)
    layers = _decoder(model)
    _compare(model, layers)
    return layers


def _flat(model: nn.Sequential) -> list[Layer]:
    layers: list[Layer] = []
    for child in model:
        layers += _flat(child) if isinstance(child, nn.Sequential) else [child]
    return layers


class DecoderBlock(nn.Module):
    """One block of a decoder, with hidden states as its only input."""

    def __init__(self, block: nn.Module, rotary: nn.Module | None) -> None:
        """Takes the block, and the module that computes the rotary embedding of positions."""
        super().__init__()
        self.block = block
        self._rotary = [rotary]  # it has no parameters, and belongs to all blocks

    def forward(self, hidden: Tensor) -> Tensor:
        """Computes the block."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        more: dict[str, Any] = {"attention_mask": None, "position_ids": positions}
        rotary = self._rotary[0]
        if rotary is not None:
            more["position_embeddings"] = rotary(hidden, positions)
        output = self.block(hidden, **more)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def _decoder(model: nn.Module) -> list[Layer]:
    name = type(model).__name__
    embedding, head = (
        getattr(model, method, lambda: None)() for method in ("get_input_embeddings", "get_output_embeddings")
    )
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    blocks = _longest_list(inner) if isinstance(inner, nn.Module) else None
    if not isinstance(embedding, nn.Module) or not isinstance(head, nn.Module) or blocks is None:
        raise ValueError(
            f"{name} is neither an nn.Sequential nor a decoder with an embedding, a list of blocks and an output "
            "layer: write its layers as a list for PipelineModule"
        )
    assert isinstance(inner, nn.Module)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "sdpa")
    if attention == "eager":
        raise ValueError(
            f"{name} has attn_implementation='eager', which needs a mask of all positions: use 'sdpa', which does not"
        )
    norm = getattr(inner, "norm", getattr(inner, "ln_f", None))
    rotary = getattr(inner, "rotary_emb", None)
    body: list[Layer] = [DecoderBlock(block, rotary) for block in blocks]
    body += [norm] if norm is not None else []
    if getattr(head, "weight", None) is not getattr(embedding, "weight", False):
        return [embedding, *body, head]
    tied = partial(TiedLayerSpec, "embedding", lambda: embedding)
    return [tied(), *body, tied(forward_fn=_tied_head)]


def _tied_head(embedding: nn.Module, hidden: Tensor) -> Tensor:
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    return nn.functional.linear(hidden, weight)


def _longest_list(model: nn.Module) -> nn.ModuleList | None:
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    return max(lists, key=len, default=None)


@torch.no_grad()
def _compare(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Raises ValueError if the layers give other logits than the model."""
    embedding = layers[0].build() if isinstance(layers[0], TiedLayerSpec) else layers[0]
    weight = embedding.get_parameter("weight")
    if weight.device.type == "meta":
        raise ValueError("the model has no values (device meta), so its layers cannot be compared with it")
    # Long enough to leave small sliding windows; dropout would make two runs differ.
    tokens = torch.arange(96, device=weight.device)[None] * 7919 % weight.shape[0]
    training = model.training
    model.eval()
    try:
        output = model(tokens)
        expected = output if isinstance(output, Tensor) else output.logits
        value: Any = tokens
        for layer in layers:
            if isinstance(layer, TiedLayerSpec):
                module = layer.build()
                value = module(value) if layer.forward_fn is None else layer.forward_fn(module, value)
            else:
                value = layer(value)
    finally:
        model.train(training)
    if value.shape != expected.shape or not torch.allclose(value, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise ValueError(
            f"{type(model).__name__} computes something between its blocks that split does not know (its logits "
            "differ): write its layers as a list for PipelineModule"
        )
