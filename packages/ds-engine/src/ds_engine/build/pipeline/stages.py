"""Runs the stages of a rank: a `RunsPipeline` over ds_pipe's `Pipeline`, whose stages ds_zero has sharded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import ds_zero
from ds_engine.build.pipeline.place import Placed
from ds_engine.job import Job

if TYPE_CHECKING:
    from ds_pipe.model import Pipeline


class ControlOfStages:
    """Control of the stages of a rank whose tied weights are reduced after the step, over the ranks of their stages.

    [Note: tied weights under ZeRO]
    A weight that several stages have is sharded over the data ranks of all of them. Its gathering and its reduction are
    collectives of ranks that are at different places of the schedule, so inside of the schedule they would wait for
    each other forever. So it is gathered before the first action, and gradients are reduced by `step`, after the last.
    """

    def __init__(self, module: nn.Module) -> None:
        own = [m for name, m in module.named_children() if name != "tied_modules"]
        self._parts = [ds_zero.control(module, m) for m in own if any(True for _ in m.parameters())]

    def unshard(self, async_op: bool = False) -> Any:
        handles = [part.unshard(async_op=True) for part in self._parts]
        gathering = _Gathering([handle for handle in handles if handle is not None])
        if async_op:
            return gathering
        gathering.wait()
        return None

    def reshard(self) -> None:
        for part in self._parts:
            part.reshard()

    def set_requires_gradient_sync(self, requires_gradient_sync: bool, *, recurse: bool = True) -> None:
        """Does nothing: the step reduces."""


class _Gathering:
    """Several gathers that have been started."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()


class StagesOfJob:
    """`RunsPipeline` over the stages of this rank, which ds_zero has sharded."""

    def __init__(
        self, job: Job, placed: Placed, device: torch.device, scale: Callable[[Tensor], Tensor]
    ) -> None:
        from ds_pipe.model import Controls, Pipeline, PipelineOptions

        module, section = placed.module, job.settings.pipeline
        whole = ds_zero.control(module)
        if module.tie_groups():
            whole.set_requires_gradient_sync(False)
            stages = ControlOfStages(module)
            controls = Controls(stages=lambda _: stages, ties=ds_zero.control(module, module.tied_modules))
        else:
            controls = Controls(stages=lambda _: whole)
        options = PipelineOptions(
            timeout_s=section.timeout_s,
            around=lambda: job.precision.around_forward(device.type),
            scale=scale,
            device=device,
            schedule=None if section.schedule == "auto" else section.schedule,
            receive_ahead=section.receive_ahead,
            max_unsharded=section.max_unsharded,
        )
        self._placed = placed
        self._pipeline: Pipeline = Pipeline(
            module, job.batch.steps, shardable_for=controls, groups=placed.groups, options=options
        )
        stages_here = module.local_stages
        self.is_first, self.is_last = 0 in stages_here, len(module.rank_of_stage) - 1 in stages_here

    @property
    def num_microbatches(self) -> int:
        return self._pipeline.num_microbatches

    def set_num_microbatches(self, num_microbatches: int) -> None:
        self._pipeline.set_num_microbatches(num_microbatches)

    def train(
        self, data: Iterable[Any], loss_weights: Sequence[float] | Callable[[Any], float] | None = None
    ) -> Tensor:
        with self._ends_on_all_ranks():
            return self._pipeline.forward_backward(data, loss_weights=loss_weights)

    def evaluate(
        self, data: Iterable[Any], *, num_microbatches: int, with_loss: bool, keep_outputs: bool
    ) -> tuple[Tensor, tuple[Any, ...]]:
        with self._ends_on_all_ranks():
            return self._pipeline.evaluate(
                data, num_microbatches=num_microbatches, with_loss=with_loss, return_outputs=keep_outputs
            )

    @contextmanager
    def _ends_on_all_ranks(self) -> Iterator[None]:
        """If this rank cannot go on, the ranks that wait for its shards or gradients cannot either."""
        from ds_pipe import PipelineError

        try:
            yield
        except PipelineError as error:
            ds_zero.control(self._placed.module).fail(str(error))
            raise

    def last_group(self) -> tuple[Any, int]:
        return self._placed.groups.pipe, self._placed.groups.last_rank

    def close(self) -> None:
        self._pipeline.close()
        self._placed.groups.close()
