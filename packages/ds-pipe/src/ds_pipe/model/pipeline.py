"""`Pipeline`: trains a `PipelineModule` in a loop of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_pipe.actions import forward
from ds_pipe.errors import PipelineError
from ds_pipe.executor.executor import Executor, StepResult
from ds_pipe.executor.group_transport import GroupTransport
from ds_pipe.executor.memory_transport import MemoryHub
from ds_pipe.interfaces import Shardable, Transport
from ds_pipe.model.groups import PipelineGroups
from ds_pipe.model.pipeline_module import PipelineModule
from ds_pipe.model.replicated import Replicated
from ds_pipe.schedule.names import make
from ds_pipe.schedule.schedule import Schedule
from ds_pipe.simulate.results import Span

ShardableFor = Callable[[int], Shardable | None]
LossWeights = Sequence[float] | Callable[[Any], float]
"""Weights of the losses of micro-batches: numbers, or a function of the labels of a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """Options of a `Pipeline`."""

    timeout_s: float = 1800.0
    """Seconds after which a message that does not arrive is an error."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes a context around every forward and around the loss function; for example `torch.autocast`."""
    scale: Callable[[Tensor], Tensor] | None = None
    """Called with the loss of each micro-batch before its backward; for example a loss scaler."""
    device: torch.device | None = None
    """Device of received activations. None: the CPU."""
    schedule: str | None = None
    """Name of another schedule with the same placement of stages on ranks. None: that of the module."""
    receive_ahead: int = 1
    """How many computations before its use a message may arrive."""
    max_unsharded: int = 2
    """How many stages of a rank may be gathered at the same time, if they are sharded."""


@dataclass(frozen=True, kw_only=True)
class Controls:
    """The controls of stages whose parameters are sharded."""

    stages: ShardableFor
    """Called with the index of each stage of this rank."""
    ties: Shardable | None = None
    """Control of the tied weights that several ranks have, which are sharded over all of these
    (`PipelineGroups.tied_data`): they are gathered before the first action of a step, on all ranks at the same time,
    and dropped after the last. Their gradients must be reduced after the step."""


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
        shardable_for: ShardableFor | Controls | None = None,
        groups: PipelineGroups | None = None,
        options: PipelineOptions = PipelineOptions(),
    ) -> None:
        """Makes the process groups, and gives tied weights and data-parallel ranks the same values. Collective.

        Args:
            module: the model.
            num_microbatches: number of micro-batches in one step.
            shardable_for: called with the index of each stage of this rank; returns its control, for stages under
                ds_zero or FSDP2. Default: the gradients of data-parallel ranks are averaged.
            groups: the process groups, if they exist already. `close` leaves them as they are.
            options: further options.

        Raises:
            ValueError: tied weights on several ranks together with a `shardable_for` without a control for them.
        """
        self.module, self.options = module, options
        controls = Controls(stages=shardable_for) if callable(shardable_for) else shardable_for
        if controls is not None and controls.ties is None and module.tie_groups():
            raise ValueError(
                f"tied weights on the pipeline ranks {module.tie_groups()[0]} are sharded, but not over all ranks that "
                "have them, so their gradients would not be added: give them the group "
                "PipelineGroups.tied_data[ranks] (ds_zero.shard(mesh_for=...)) and pass Controls(ties=...). With "
                'schedule "zb-v", first and last stage are on one rank'
            )
        self.is_sharded = controls is not None
        """Whether something else than this object reduces gradients."""
        self._ties = controls.ties if controls is not None else None
        self._own_groups = groups is None
        self.groups = PipelineGroups(module) if groups is None else groups
        if controls is None:
            self._broadcast_ties()
        self._controls = {
            stage: self._replicated(stage) if controls is None else controls.stages(stage)
            for stage in module.local_stages
        }
        self._channel = self._transport()
        self._stages = {
            stage: module.stage(stage, self._controls[stage], options.around) for stage in module.local_stages
        }
        self._executors: dict[tuple[int, bool], Executor] = {}
        self.num_microbatches = num_microbatches
        self._executor(num_microbatches, trains=True)
        self._spans: tuple[Span, ...] = ()

    def forward_backward(
        self, data: Iterable[Any], *, loss_weights: LossWeights | None = None, measure: bool = False
    ) -> Tensor:
        """Computes losses and gradients of one step; gradients are reduced, the optimizer has not stepped.

        Args:
            data: an iterator of which one item, (inputs, labels), is taken for each micro-batch, on the ranks of the
                first and of the last stage.
            loss_weights: a function that is called with the labels of each micro-batch and returns its weight, such as
                its number of tokens; all ranks must pass it. The loss is then the weighted mean over all micro-batches
                of all data-parallel ranks. Or, on the rank of the last stage, factors of the losses of its
                micro-batches, which are added and not divided. Default: all micro-batches count the same.
            measure: note when each action runs, for `gathered_spans`.

        Returns:
            The mean loss over micro-batches and data-parallel ranks, the same on all ranks; with factors, the mean over
            data-parallel ranks of their weighted sums.

        Raises:
            PipelineError: on every rank, if a stage has failed on some rank, or if the data of a rank has ended.
        """
        executor = self._executor(self.num_microbatches, trains=True)
        with self._ends_on_all_ranks():
            weigh = loss_weights if callable(loss_weights) else None
            inputs, labels, weights = self._take(executor, data, self.num_microbatches, weigh)
            if not callable(loss_weights):
                weights = loss_weights
            else:
                with executor.agreeing(self.groups.leave):  # or a rank could not read its data
                    weights = self._normalised(weights)
            if self._ties is not None:
                self._ties.unshard()
            result = executor.step(
                inputs, labels, loss_weights=weights, scale=self.options.scale, measure=measure
            )
            loss = self._agreed(executor, self._sum(result, weights))
            if self._ties is not None:
                self._ties.reshard()
        self._spans = result.spans
        if not self.is_sharded:
            self._reduce_ties()
        return loss

    def evaluate(
        self,
        data: Iterable[Any],
        *,
        return_outputs: bool = False,
        num_microbatches: int | None = None,
        with_loss: bool = True,
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Computes losses without gradients; returns their mean, and on the rank of the last stage its outputs.

        Args:
            data: as for `forward_backward`.
            return_outputs: whether to return the outputs.
            num_microbatches: number of micro-batches. Default: as in training.
            with_loss: whether to call the loss function; otherwise labels are not used, the loss is 0, and outputs are
                returned.

        Raises:
            PipelineError: as `forward_backward`.
        """
        count = self.num_microbatches if num_microbatches is None else num_microbatches
        executor = self._executor(count, trains=False)
        with self._ends_on_all_ranks():
            inputs, labels, _ = self._take(executor, data, count)
            if self._ties is not None:
                self._ties.unshard()
            result = executor.step(inputs, labels if with_loss else None, keep_outputs=return_outputs)
            loss = self._agreed(executor, self._sum(result, None))
            if self._ties is not None:
                self._ties.reshard()
        return loss, result.outputs

    def set_num_microbatches(self, num_microbatches: int) -> None:
        """Changes the number of micro-batches of the following steps.

        Raises:
            ValueError: the schedule does not exist for that number.
        """
        self._executor(num_microbatches, trains=True)
        self.num_microbatches = num_microbatches

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales gradients so that their 2-norm over the whole model is at most `max_norm`; returns the norm before.

        Tied weights count once. For stages under ds_zero use `ds_zero.clip_grad_norm_`.

        Raises:
            ValueError: there are tensor-parallel ranks, whose parts of the model this object does not know.
        """
        if self.module.process_topology.get_dim("model") > 1:
            raise ValueError(
                f"{self.module.process_topology}: which parameters are divided among the ranks of the axis 'model' is "
                "known to their layers only: shard the module with ds_zero.shard(model_parallel=...), or train it with "
                "ds_engine.initialize, whose norms are over all axes"
            )
        counted_elsewhere = {
            id(param) for _, ranks, param in self.module.tied_parameters() if ranks[0] != self.module.stage_id
        }
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        square = torch.zeros((), dtype=torch.float64)
        for param in self.module.parameters():
            if param.grad is not None and id(param) not in counted_elsewhere:
                square += param.grad.double().square().sum().cpu()
        if self.groups.pipe is not None:
            dist.all_reduce(square, group=self.groups.pipe)
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
        if self.groups.pipe is None:
            return self._spans
        every: list[tuple[Span, ...]] = [()] * dist.get_world_size(self.groups.pipe)
        dist.all_gather_object(every, self._spans, self.groups.pipe)
        return tuple(span for spans in every for span in spans)

    def close(self) -> None:
        """Ends what runs in the background."""
        for executor in self._executors.values():
            executor.close()
        self._executors.clear()
        if self._own_groups:
            self.groups.close()

    @contextmanager
    def _ends_on_all_ranks(self) -> Iterator[None]:
        """If this rank cannot go on, the ranks that wait for it in a collective of the model cannot either."""
        try:
            yield
        except PipelineError:
            self.groups.leave()
            raise

    def _executor(self, count: int, *, trains: bool) -> Executor:
        """The executor for a number of micro-batches. The two of the last numbers are kept."""
        key = count, trains
        if key not in self._executors:
            wanted = self.options.schedule
            schedule = self.module.make_schedule(count, wanted) if trains else self._forwards(count)
            executor = Executor(
                schedule,
                self.module.stage_id,
                self._stages,
                self._channel,
                receive_ahead=self.options.receive_ahead,
                max_unsharded=self.options.max_unsharded,
                title=f"rank {self.module.global_rank}",
            )
            self._executors = {k: e for k, e in self._executors.items() if k[1] != trains} | {key: executor}
        return self._executors[key]

    def _take(
        self,
        executor: Executor,
        data: Iterable[Any],
        count: int,
        weigh: Callable[[Any], float] | None = None,
    ) -> tuple[list[Any] | None, list[Any] | None, Sequence[float] | None]:
        """Inputs on the rank of the first stage; labels, and their weights, on that of the last; None elsewhere."""
        stages = self.module.local_stages
        first, last = 0 in stages, len(self.module.rank_of_stage) - 1 in stages
        if not (first or last):
            return None, None, None
        rank = self.module.global_rank
        try:
            iterator: Iterator[Any] = iter(data)
            items = [item for _, item in zip(range(count), iterator, strict=False)]
            for number, item in enumerate(items):
                if not isinstance(item, (tuple, list)) or len(item) != 2:
                    raise TypeError(
                        f"micro-batch {number} is a {type(item).__name__}: the data of a pipeline are pairs (inputs, "
                        "labels)"
                    )
            weights = [float(weigh(item[1])) for item in items] if last and weigh is not None else None
        except Exception as error:
            message = f"rank {rank} could not read its data: {type(error).__name__}: {error}"
            executor.fail(message)
            raise PipelineError(message) from error
        if len(items) < count:
            message = f"the data of rank {rank} ended after {len(items)} of {count} micro-batches"
            executor.fail(message)
            raise PipelineError(message)
        return (
            [item[0] for item in items] if first else None,
            [item[1] for item in items] if last else None,
            weights,
        )

    def _normalised(self, weights: Sequence[float] | None) -> Sequence[float] | None:
        """Factors of losses on the ranks of the last stage whose mean over data-parallel ranks is the weighted mean."""
        if weights is None:
            return None
        total = torch.tensor(sum(weights), dtype=torch.float64)
        ranks = 1
        if self.groups.data is not None:
            dist.all_reduce(total, group=self.groups.data)
            ranks = dist.get_world_size(self.groups.data)
        # Without any weight, such as tokens of padding only, there is nothing to learn: all factors are 0.
        return [weight * ranks / total.item() if weight else 0.0 for weight in weights]

    def _sum(self, result: StepResult, weights: Sequence[float] | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        for m, loss in enumerate(result.losses):
            # Without a loss function, what is evaluated is the mean of the output.
            total += loss.float().mean().cpu() * (1 / len(result.losses) if weights is None else weights[m])
        return total

    def _agreed(self, executor: Executor, total: Tensor) -> Tensor:
        """The mean over data-parallel ranks, on all ranks. When one has it, none can fail in this step any more."""
        if self.groups.every is None:
            executor.finish()
            return total
        is_counted = self.groups.last_rank == self.module.global_rank and self.groups.part == 0
        counted = total if is_counted else torch.zeros_like(total)
        with executor.agreeing(self.groups.leave):
            dist.all_reduce(counted, group=self.groups.every)
        return counted / max(1, self.module.process_topology.get_dim("data"))

    def _replicated(self, stage: int) -> Shardable | None:
        if self.groups.data is None or dist.get_world_size(self.groups.data) == 1:
            return None
        # Tied weights may be in several stages: they are reduced at the end of the step.
        return Replicated(self.module.stage_module(stage).parameters(), self.groups.data)

    @torch.no_grad()
    def _broadcast_ties(self) -> None:
        for _, ranks, param in self.module.tied_parameters():
            for group in (self.groups.ties.get(ranks), self.groups.data):
                if group is not None:
                    dist.broadcast(param, dist.get_process_group_ranks(group)[0], group)

    @torch.no_grad()
    def _reduce_ties(self) -> None:
        """Adds the gradients of a tied weight over the stages that have it, then averages them over data ranks."""
        replicated = isinstance(next(iter(self._controls.values())), Replicated)
        for _, ranks, param in self.module.tied_parameters():
            if not param.requires_grad:
                continue
            if len(ranks) > 1 and param.grad is None:
                param.grad = torch.zeros_like(param)
            if param.grad is None:
                continue
            if ranks in self.groups.ties:
                dist.all_reduce(param.grad, group=self.groups.ties[ranks])
            if replicated and self.groups.data is not None:
                dist.all_reduce(param.grad, group=self.groups.data)
                param.grad /= dist.get_world_size(self.groups.data)

    def _transport(self) -> Transport:
        if self.groups.messages is None:
            return MemoryHub(1).transport(0)
        return GroupTransport(
            self.groups.messages,
            device=self.options.device,
            timeout_s=self.options.timeout_s,
            board=self.groups.board(),
        )

    def _forwards(self, num_microbatches: int) -> Schedule:
        """Forwards only, in the placement that the training schedule has."""
        rank_of_stage, ranks = self.module.rank_of_stage, self.module.num_stages
        template = make("inference", ranks, num_microbatches)
        rows = tuple(
            tuple(
                forward(s, m)
                for m in range(num_microbatches)
                for s, r in enumerate(rank_of_stage)
                if r == rank
            )
            for rank in range(ranks)
        )
        return replace(template, rank_of_stage=rank_of_stage, actions=rows)
