"""A pipeline for `ds plan`, and its training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_pipe.model import LayerSpec, PipelineModule, TiedLayerSpec
from pipe.model.test_pipeline import head

VOCABULARY, TOKENS, WIDTH, ROWS = 512, 64, 64, 4


class Wide(nn.Module):
    """A block whose activations weigh as much as its states."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def pipeline(schedule: str = "1f1b", stages: int = 2, tied: bool = False) -> PipelineModule:
    embedding = ("tokens", nn.Embedding, VOCABULARY, WIDTH)
    first = TiedLayerSpec(*embedding) if tied else LayerSpec(*embedding[1:])
    last = (
        TiedLayerSpec(*embedding, forward_fn=head)
        if tied
        else LayerSpec(nn.Linear, WIDTH, VOCABULARY, bias=False)
    )
    layers = [first, *[LayerSpec(Wide) for _ in range(6)], last]
    return PipelineModule(layers, stages, loss_fn=loss_fn, partition_method="uniform", schedule=schedule)


def micro_batch() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, TOKENS, dtype=torch.long), torch.zeros(1, TOKENS, dtype=torch.long)


def piped() -> tuple[PipelineModule, Any]:
    """For the command line."""
    return pipeline(), micro_batch()


def config(stage: int, micro_batches: int = 4) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "foreach": True}},
        "startup_summary": False,
        "steps_per_print": 0,
    }
