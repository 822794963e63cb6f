"""A pipeline model as the training that `ds_engine.build.verify` verifies.

[Note: what is compared of a pipeline]
Rank 0 also has the plain model: all layers in one stage (`ds_pipe.model.undivided`), under the same names. What stages
construct depends on which layers a rank has, so the plain training takes over their initial values. The loss is the
mean over all micro-batches, the only one that every schedule reports. Random numbers of layers depend on the rank that
draws them, so that a model with dropout cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_engine.build import zero
from ds_engine.build.zero import gathered
from ds_engine.engine import Engine
from ds_engine.job import Job
from ds_zero.params.access import PARAM, get_full
from ds_zero.prove.lockstep import Candidate
from ds_zero.prove.reference_training import Recipe

if TYPE_CHECKING:
    from ds_engine.pipeline_engine import PipelineEngine

LOSS_NAME = "all micro-batches"


def check(model: Any, loss: Any) -> None:
    """Raises ValueError for a pipeline that cannot be compared with plain PyTorch.

    Args:
        model: a `ds_pipe.model.PipelineModule`.
        loss: the argument of `verify`.
    """
    if loss is not None:
        raise ValueError(
            "ds verify: the loss of a pipeline is that of PipelineModule(loss_fn=...): remove --loss"
        )
    if model.process_topology.get_dim("model") > 1:
        raise ValueError(
            f"ds verify: {model.process_topology}: ranks of the axis 'model' have parts of layers, and rank 0 cannot "
            "construct the whole ones. Verify the pipeline without tensor parallelism"
        )


class Trained(Candidate):
    """An engine of a pipeline as the training to verify, [Note: what is compared of a pipeline]."""

    in_stages = True

    def __init__(self, engine: PipelineEngine, recipe: Recipe) -> None:
        self._engine = engine
        self.model, self.recipe = engine.module, recipe
        names = frozenset(n for n, _ in self.model.named_parameters(remove_duplicate=False))
        self._names_of: list[frozenset[str]] = gathered(names, engine.world.world_size)
        """Names of the parameters of each rank."""
        self._data_index = engine.job.topology.data.index

    def train(self, table: Sequence[Sequence[Any]], first: int) -> Mapping[str, float]:
        loss = self._engine.forward_backward(iter([row[self._data_index] for row in table]))
        return {LOSS_NAME: loss.item()}

    def step(self) -> None:
        Engine.step(self._engine)
        norm = self._engine.get_global_grad_norm()
        self.norm = float("nan") if norm is None else norm

    def named_losses(self, losses: Sequence[Sequence[float]]) -> Mapping[str, float]:
        """The mean, added in fp32 in the order in which the pipeline adds."""
        of_rank = [torch.zeros(()) for _ in losses[0]]
        for row in losses:
            for total, loss in zip(of_rank, row, strict=True):
                total += torch.tensor(loss) * (1 / len(losses))
        return {LOSS_NAME: (torch.stack(of_rank).sum() / len(of_rank)).item()}

    def full(self, name: str, kind: str = PARAM) -> Tensor | None:
        """Of the ranks that have the parameter, the first one sends its whole value to all."""
        own = get_full(self.model, name, kind) if name in self._names_of[self._engine.world.rank] else None
        holder = next((rank for rank, names in enumerate(self._names_of) if name in names), 0)
        box = [own]
        if dist.is_initialized():
            dist.broadcast_object_list(box, holder)
        return box[0]

    def buffers(self) -> Mapping[str, Tensor]:
        own = dict(self.model.named_buffers()) if self._data_index == 0 else {}
        every: list[dict[str, Tensor]] = gathered(own, self._engine.world.world_size)
        return {name: value for buffers in every for name, value in buffers.items()}


class Plain:
    """A pipeline model in one stage as the plain training calls it: with inputs and labels, for the loss."""

    def __init__(self, module: Any, job: Job) -> None:
        self._module, self._precision, self._device_type = module, job.precision, job.device_type

    def __call__(self, inputs: Any, labels: Any) -> Tensor:
        """Computes the loss as the last stage does."""
        with self._precision.around_forward(self._device_type):
            output = self._module(self._precision.cast(inputs))
            loss: Tensor = output if self._module.loss_fn is None else self._module.loss_fn(output, labels)
        return loss


def adapted(recipe: Recipe, job: Job) -> Recipe:
    """Returns the recipe of an ordinary model for a pipeline."""

    def config(module: nn.Module) -> ds_zero.ZeroConfig:
        # At every ZeRO stage, a schedule reduces the sums over micro-batches.
        config = zero.zero_config(job, module)
        return config if config.rank_invariant else replace(config, accumulation="local")

    return replace(
        recipe,
        loss=lambda model, pair: model(*pair),
        config=config,
        ranks=job.batch.ranks,
        dress=lambda module, _: Plain(module, job),
    )


def undivided() -> AbstractContextManager[None]:
    """Returns a context manager within which a pipeline model is constructed whole on this rank."""
    from ds_pipe.model import undivided as whole

    return whole()
