"""The axes of a job that divide a model itself, in a plan: tensor-parallel layers, divided experts, divided sequences.

[Note: model axes in a plan]
A plan runs the model of one rank. So its layers are cut as they are when the job starts, by the same functions, over
groups that send nothing and count what they would send (`FakeGroup`). Experts are those of rank 0, and all experts are
assumed to be chosen equally often. A layer with `ep_size` above 1 asks for the ranks of the job while it is made: they
are there as a process group in which nothing is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ds_engine.build import moe
from ds_engine.build.layers import tensor
from ds_engine.config import DsConfig
from ds_engine.job import Job
from ds_zero.predict.fake_group import FakeGroup


@dataclass(frozen=True, kw_only=True)
class ModelAxes:
    """The groups over which a planned model sends messages within its layers."""

    groups: Mapping[str, FakeGroup] = field(default_factory=dict)
    """Axis ("tensor", "expert", "sequence") -> its group. Layers with different `ep_size` share the largest group's
    counter."""
    expert_ranks: int = 1
    """The largest `ep_size` of the model."""
    notes: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Returns axis -> number of ranks."""
        return {name: group.size() for name, group in self.groups.items()}

    def clear(self) -> None:
        """Counts messages anew."""
        for group in self.groups.values():
            group.sent_bytes, group.messages = 0.0, 0

    def counted(self) -> dict[str, tuple[float, int]]:
        """Returns axis -> (bytes that this rank sent, number of messages) since `clear`."""
        return {name: (group.sent_bytes, group.messages) for name, group in self.groups.items()}


def connected(settings: DsConfig, job: Job, model: nn.Module) -> ModelAxes:
    """Cuts the layers of a model on the meta device for one rank of the job, in place, and connects its experts and its
    attention with groups that send nothing.

    Raises:
        ConfigError: the layers cannot be cut so.
    """
    groups: dict[str, FakeGroup] = {}
    notes: list[str] = []
    parts, sequence = job.topology.tensor.size, job.topology.sequence.size
    # In the order in which the engine does it.
    alone = job.topology.world_size == 1 or dist.is_initialized() or not settings.expert_parallel.enabled
    with nullcontext() if alone else as_rank(0, job.topology.world_size):
        moe.convert_for_plan(model, settings, job.topology)
    experts = max(moe.sizes_of_experts(model).values(), default=1)
    if experts > 1:
        groups["expert"] = FakeGroup(0, experts)
        moe.connect_for_plan(model, groups["expert"].same_counts)
        notes.append("experts are planned as if all were chosen equally often, and no token was dropped")
    if parts > 1:
        groups["tensor"] = FakeGroup(0, parts)
        tensor.cut(model, settings, groups["tensor"], None)
        moe.cut(model, settings, groups["tensor"])
    if sequence > 1:
        groups["sequence"] = FakeGroup(0, sequence)
        if not tensor.divide_sequences(model, groups["sequence"]):
            notes.append(
                "sequences: the inputs are planned as those of one rank, and messages of attention are not counted, "
                "since the model is none of Transformers"
            )
    return ModelAxes(groups=groups, expert_ranks=experts, notes=tuple(notes))


def divided(inputs: Any, job: Job, model: nn.Module) -> Any:
    """Returns the tokens of one rank of a batch with whole sequences, for a model whose attention `connected` has
    divided; other batches as they are.
    """
    size = job.topology.sequence.size
    if size == 1 or not tensor.is_of_transformers(model):
        return inputs
    return tree_map_only(
        Tensor,
        lambda t: t[:, : -(-t.shape[1] // size)] if t.ndim > 1 and not t.is_floating_point() else t,
        inputs,
    )


def made_on_meta(factory: Callable[[], Any], ranks: int) -> Any:
    """Calls a function that makes a model, on the meta device; if its layers ask for the ranks of the job, as the
    first of them.
    """
    try:
        with torch.device("meta"):
            return factory()
    except Exception as error:
        if ranks == 1 or dist.is_initialized() or not _asks_for_ranks(error):
            raise
    with as_rank(0, ranks), torch.device("meta"):
        return factory()


def _asks_for_ranks(error: BaseException | None) -> bool:
    if "ds_moe" not in sys.modules or error is None:
        return False
    from ds_moe import ExpertParallelError

    return isinstance(error, ExpertParallelError) or _asks_for_ranks(error.__cause__)


@contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """A process group of which this process is one rank, and in which nothing is sent.

    Raises:
        ValueError: a process group exists already.
    """
    if dist.is_initialized():
        raise ValueError("a process group exists in this process: plan a pipeline in one that trains nothing")
    dist.init_process_group("fake", rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
