"""`Pipeline`: trains a `PipelineModule` in a loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pipe.actions import forward
from ds_pipe.executor.executor import Executor, StepResult
from ds_pipe.executor.group_transport import GroupTransport
from ds_pipe.executor.memory_transport import MemoryHub
from ds_pipe.interfaces import Shardable, Transport
from ds_pipe.model.pipeline_module import PipelineModule
from ds_pipe.model.replicated import Replicated
from ds_pipe.schedule.names import make
from ds_pipe.schedule.schedule import Schedule
from ds_pipe.simulate.results import Span

ShardableFor = Callable[[int], Shardable | None]


class Pipeline:
    """Runs the schedule of a `PipelineModule`, and what its ranks have to exchange besides activations.

    ::

        pipeline = Pipeline(module, num_microbatches=8)
        optimizer = torch.optim.AdamW(module.parameters())
        for _ in range(steps):
            loss = pipeline.forward_backward(batches)        # the same value on all ranks
            pipeline.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    """

    def __init__(
        self,
        module: PipelineModule,
        num_microbatches: int,
        *,
        shardable_for: ShardableFor | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        """Makes the process groups, and gives tied weights and data-parallel ranks the same values. Collective.

        Args:
            module: the model.
            num_microbatches: number of micro-batches in one step.
            shardable_for: called with the index of each stage of this rank; returns its control, for stages under
                ds_zero or FSDP2. Default: the gradients of data-parallel ranks are averaged.
            timeout_s: seconds after which a message that does not arrive is an error.

        Raises:
            ValueError: tied weights on several ranks together with `shardable_for`.
        """
        self.module, self.num_microbatches = module, num_microbatches
        if shardable_for is not None and module.tie_groups():
            raise ValueError(
                f"tied weights on the pipeline ranks {module.tie_groups()[0]} cannot be sharded: their gradients have "
                'to be added before they are reduced. With schedule "zb-v", first and last stage are on one rank'
            )
        self._groups = _Groups(module)
        self._transport_timeout_s = timeout_s
        self._broadcast_ties()
        self._controls = {
            stage: self._replicated(stage) if shardable_for is None else shardable_for(stage)
            for stage in module.local_stages
        }
        transport = self._transport()
        stages = {stage: module.stage(stage, self._controls[stage]) for stage in module.local_stages}
        self._executor = Executor(module.make_schedule(num_microbatches), module.stage_id, stages, transport)
        self._stages, self._channel = stages, transport
        self._evaluation: Executor | None = None
        self._spans: tuple[Span, ...] = ()

    def forward_backward(
        self, data: Iterable[Any], *, loss_weights: Sequence[float] | None = None, measure: bool = False
    ) -> Tensor:
        """Computes losses and gradients of one step; gradients are reduced, the optimizer has not stepped.

        Args:
            data: an iterator of which one item, (inputs, labels), is taken for each micro-batch, on the ranks of the
                first and of the last stage.
            loss_weights: see `Executor.step`.
            measure: note when each action runs, for `gathered_spans`.

        Returns:
            The mean loss over micro-batches and data-parallel ranks, or with weights the weighted sum; the same on all
            ranks.

        Raises:
            PipelineError: a stage has failed on some rank.
        """
        inputs, labels = self._take(data)
        result = self._executor.step(inputs, labels, loss_weights=loss_weights, measure=measure)
        self._executor.finish()
        self._spans = result.spans
        self._reduce_ties()
        return self._loss(result, loss_weights)

    def evaluate(
        self, data: Iterable[Any], *, return_outputs: bool = False
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Computes losses without gradients; returns their mean, and on the rank of the last stage its outputs."""
        if self._evaluation is None:
            # Forwards only, in the placement that the training schedule has.
            schedule = _forwards(self._executor.schedule.rank_of_stage, self.num_microbatches)
            self._evaluation = Executor(schedule, self.module.stage_id, self._stages, self._channel)
        inputs, labels = self._take(data)
        result = self._evaluation.step(inputs, labels, keep_outputs=return_outputs)
        self._evaluation.finish()
        return self._loss(result, None), result.outputs

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales gradients so that their 2-norm over the whole model is at most `max_norm`; returns the norm before.

        Tied weights count once. For stages under ds_zero use `ds_zero.clip_grad_norm_`.
        """
        counted_elsewhere = {
            id(param) for _, ranks, param in self.module.tied_parameters() if ranks[0] != self.module.stage_id
        }
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        square = torch.zeros((), dtype=torch.float64)
        for param in self.module.parameters():
            if param.grad is not None and id(param) not in counted_elsewhere:
                square += param.grad.double().square().sum().cpu()
        if self._groups.pipe is not None:
            dist.all_reduce(square, group=self._groups.pipe)
        norm = square.sqrt()
        factor = float(max_norm / (norm + 1e-6))
        if factor < 1.0:
            for grad in grads:
                grad.mul_(factor)
        return norm

    def gathered_spans(self) -> tuple[Span, ...]:
        """Returns when each action of the last measured step ran, on all pipeline ranks, for `ds_pipe.draw`.

        Collective. Clocks are those of the ranks; on one machine they are the same.
        """
        if self._groups.pipe is None:
            return self._spans
        every: list[tuple[Span, ...]] = [()] * dist.get_world_size(self._groups.pipe)
        dist.all_gather_object(every, self._spans, self._groups.pipe)
        return tuple(span for spans in every for span in spans)

    def close(self) -> None:
        """Ends what runs in the background."""
        self._executor.close()
        self._groups.close()

    def _take(self, data: Iterable[Any]) -> tuple[list[Any] | None, list[Any] | None]:
        stages = self.module.local_stages
        first, last = 0 in stages, len(self.module.rank_of_stage) - 1 in stages
        if not (first or last):
            return None, None
        iterator: Iterator[Any] = iter(data)
        items = [item for item, _ in zip(iterator, range(self.num_microbatches), strict=False)]
        if len(items) < self.num_microbatches:
            raise ValueError(f"the data ended after {len(items)} of {self.num_microbatches} micro-batches")
        return (
            [item[0] for item in items] if first else None,
            [item[1] for item in items] if last else None,
        )

    def _loss(self, result: StepResult, weights: Sequence[float] | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        for m, loss in enumerate(result.losses):
            total += loss.float().cpu() * (1 / self.num_microbatches if weights is None else weights[m])
        if self._groups.data is not None:
            dist.all_reduce(total, group=self._groups.data)
            total /= dist.get_world_size(self._groups.data)
        if self._groups.pipe is not None:
            dist.broadcast(total, self._groups.last_rank, self._groups.pipe)
        return total

    def _replicated(self, stage: int) -> Shardable | None:
        if self._groups.data is None or dist.get_world_size(self._groups.data) == 1:
            return None
        # Tied weights may be in several stages: they are reduced at the end of the step.
        return Replicated(self.module.stage_module(stage).parameters(), self._groups.data)

    @torch.no_grad()
    def _broadcast_ties(self) -> None:
        for _, ranks, param in self.module.tied_parameters():
            for group in (self._groups.ties.get(ranks), self._groups.data):
                if group is not None:
                    dist.broadcast(param, dist.get_process_group_ranks(group)[0], group)

    @torch.no_grad()
    def _reduce_ties(self) -> None:
        """Adds the gradients of a tied weight over the stages that have it, then averages them over data ranks."""
        replicated = isinstance(next(iter(self._controls.values())), Replicated)
        for _, ranks, param in self.module.tied_parameters():
            if len(ranks) > 1 and param.grad is None:
                param.grad = torch.zeros_like(param)
            if param.grad is None:
                continue
            if ranks in self._groups.ties:
                dist.all_reduce(param.grad, group=self._groups.ties[ranks])
            if replicated and self._groups.data is not None:
                dist.all_reduce(param.grad, group=self._groups.data)
                param.grad /= dist.get_world_size(self._groups.data)

    def _transport(self) -> Transport:
        if self._groups.messages is None:
            return MemoryHub(1).transport(0)
        return GroupTransport(self._groups.messages, timeout_s=self._transport_timeout_s)


class _Groups:
    """The process groups of one rank; all ranks make all groups in the same order."""

    def __init__(self, module: PipelineModule) -> None:
        self.pipe: dist.ProcessGroup | None = None
        self.messages: dist.ProcessGroup | None = None
        self.data: dist.ProcessGroup | None = None
        self.ties: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.last_rank = 0
        if not dist.is_initialized():
            return
        topology, me = module.topology, module.global_rank
        lines = topology.get_axis_comm_lists("pipe")
        for line in lines:
            pipe, messages = dist.new_group(line), dist.new_group(line)
            if me in line:
                self.pipe, self.messages = pipe, messages
                self.last_rank = line[module.rank_of_stage[-1]]
            for ranks in module.tie_groups():
                members = [line[rank] for rank in ranks]
                group = dist.new_group(members)
                if me in members:
                    self.ties[ranks] = group
        for line in topology.get_axis_comm_lists("data"):
            group = dist.new_group(line)
            if me in line:
                self.data = group

    def close(self) -> None:
        for group in {*self.ties.values(), self.pipe, self.messages, self.data} - {None}:
            dist.destroy_process_group(group)


def _forwards(rank_of_stage: tuple[int, ...], num_microbatches: int) -> Schedule:
    """Forwards only, for any placement."""
    ranks = max(rank_of_stage) + 1
    template = make("inference", ranks, num_microbatches)
    rows = tuple(
        tuple(
            forward(s, m) for m in range(num_microbatches) for s, r in enumerate(rank_of_stage) if r == rank
        )
        for rank in range(ranks)
    )
    return replace(template, rank_of_stage=rank_of_stage, actions=rows)
