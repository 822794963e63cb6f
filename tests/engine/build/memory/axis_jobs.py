"""Jobs whose model is divided itself (tensor, experts, sequence): planned, and counted while they train."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
import ds_moe
import ds_zero
from ds_core import arena
from ds_engine.build.memory.plan import Planned
from ds_engine.config import load
from ds_layers import SequenceParallelAttention, register_with_transformers
from ds_zero.predict.measured_memory import counted_memory
from zero.planned import Block

VOCABULARY, TOKENS, WIDTH, ROWS = 256, 64, 128, 4


class Cuttable(Block):
    """A block whose heads are those that its first layer has, with experts in place of feed-forward layers, or not."""

    def __init__(self, ep_size: int) -> None:
        super().__init__(WIDTH)
        self.moe: nn.Module | None = None
        if ep_size:
            del self.up, self.down
            expert = lambda: ds_moe.FeedForward(WIDTH, 2 * WIDTH)  # noqa: E731
            self.moe = ds_moe.MoE(WIDTH, expert, 4, ep_size, k=1, use_rts=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        heads = [h.view(b, t, -1, d // 4).transpose(1, 2) for h in self.qkv(self.first(x)).chunk(3, -1)]
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, -1))
        inner = self.second(x)
        if self.moe is not None:
            return x + self.moe(inner)[0]  # type: ignore[no-any-return]
        return x + self.down(nn.functional.gelu(self.up(inner)))


class Language(nn.Module):
    """Blocks with a loss. `ep_size` 0: without experts."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(Cuttable(ep_size) for _ in range(3))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1).float(), labels.flatten())


CUT = {
    "autotp_size": 2,
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": ["blocks[.][0-9]+[.]qkv[.]weight"], "partition_type": "column", "shape": [3, -1]},
            {"patterns": ["blocks[.][0-9]+[.]up[.]weight"], "partition_type": "column"},
            {"patterns": ["blocks[.][0-9]+[.](out|down)[.]weight"], "partition_type": "row"},
        ],
    },
}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(  # type: ignore[no-any-return]
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )


@dataclass(frozen=True)
class AxisJob:
    name: str
    ranks: int
    stage: int
    more: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 0

    def __str__(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "")

    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": ROWS,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "gradient_clipping": 1.0,
            "startup_summary": False,
            "steps_per_print": 0,
            **self.more,
        }

    def model(self) -> nn.Module:
        return llama() if "sequence_parallel_size" in self.more else Language(self.experts)

    def made(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """For `ds plan`."""
        tokens = torch.zeros(ROWS, TOKENS, dtype=torch.long)
        return self.model(), {"input_ids": tokens, "labels": tokens}

    def plan(self) -> ds_zero.Plan:
        return Planned.of(load(self.config()), self.made, ranks=self.ranks, device="cpu").memory()

    def count(self) -> int:
        """The counted peak of a training of three steps on this rank."""
        torch.manual_seed(0)
        with counted_memory(lambda: arena.stats().in_use_bytes) as counted:
            model = self.model()
            engine, *_ = ds_engine.initialize(model, self.config())
            size = engine.topology.sequence.size
            if size > 1:
                attention = SequenceParallelAttention(engine.roles.sequence_group)
                register_with_transformers(attention, model=model)
            torch.manual_seed(1 + dist.get_rank() // (engine.topology.tensor.size * size))
            for _ in range(3):
                tokens = torch.randint(VOCABULARY, (ROWS, TOKENS))
                own = tokens.chunk(size, 1)[engine.topology.sequence.index].contiguous()
                more: dict[str, Tensor] = {}
                if size > 1:
                    begin = engine.topology.sequence.index * own.shape[1]
                    more["position_ids"] = torch.arange(begin, begin + own.shape[1]).unsqueeze(0)
                out = engine(input_ids=own, labels=own, **more)
                loss = out if isinstance(out, Tensor) else out.loss
                del out
                engine.backward(loss)
                engine.step()
                del loss
        engine.destroy()
        return counted.peak_bytes


def tensor(stage: int, ranks: int, **more: Any) -> AxisJob:
    return AxisJob(f"tensor 2, stage {stage}, {ranks} ranks", ranks, stage, {"tensor_parallel": CUT, **more})


def experts(stage: int, ranks: int, **more: Any) -> AxisJob:
    return AxisJob(f"experts 2, stage {stage}, {ranks} ranks", ranks, stage, more, experts=2)


def sequence(stage: int, ranks: int, **more: Any) -> AxisJob:
    return AxisJob(
        f"sequence 2, stage {stage}, {ranks} ranks", ranks, stage, {"sequence_parallel_size": 2, **more}
    )


def count(job: AxisJob) -> None:
    """Trains, and writes the largest peak of all ranks."""
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, job.count())
    if dist.get_rank() == 0:
        print("COUNTED", json.dumps(max(peaks)))
