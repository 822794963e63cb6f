"""The executor: one loop over the actions of a rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ds_pipe.actions import Action, Op, computations
from ds_pipe.errors import PipelineError
from ds_pipe.executor.stage import Stage
from ds_pipe.executor.values import detached
from ds_pipe.interfaces import ReducesGradients, Transport, Work
from ds_pipe.schedule.lowering import lower
from ds_pipe.schedule.schedule import Schedule
from ds_pipe.simulate.results import Span
from ds_pipe.simulate.simulator import simulate

_WORDS: Mapping[Op, str] = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward for the input",
    Op.BACKWARD_WEIGHT: "backward for the weights",
    Op.SEND_FORWARD: "sending activations",
    Op.RECV_FORWARD: "receiving activations",
    Op.SEND_BACKWARD: "sending gradients",
    Op.RECV_BACKWARD: "receiving gradients",
    Op.UNSHARD: "gathering parameters",
    Op.RESHARD: "dropping parameters",
    Op.REDUCE_GRAD: "reducing gradients",
}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step gave on this rank."""

    losses: tuple[Tensor, ...]
    """On the rank of the last stage, the loss of every micro-batch, without its weight; empty elsewhere."""
    outputs: tuple[Any, ...]
    """On the rank of the last stage, its outputs without gradients, if they were asked for; empty elsewhere."""
    spans: tuple[Span, ...]
    """When each action ran, if that was asked for: `ds_pipe.draw` draws it."""


@dataclass
class _Step:
    """The state of one step."""

    inputs: Sequence[Any] | None
    targets: Sequence[Any] | None
    weights: Sequence[float | Tensor] | None
    scale: Callable[[Tensor], Tensor] | None
    keep_outputs: bool
    values: dict[tuple[int, int], Any] = field(default_factory=dict)
    """(stage, micro-batch) -> the input of a stage from a stage on this rank."""
    gradients: dict[tuple[int, int], list[Tensor | None]] = field(default_factory=dict)
    """(stage, micro-batch) -> the gradients of a stage's output from a stage on this rank."""
    to_send: dict[Action, Any] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    gathers: dict[int, Work | None] = field(default_factory=dict)


class Executor:
    """Runs the stages of one rank as a schedule says.

    ::

        executor = Executor(make("1f1b", 4, 8), rank, {rank: Stage(module, rank)}, GroupTransport())
        executor.step(inputs, targets)             # backward has run: gradients are in .grad
        optimizer.step()
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        stages: Mapping[int, Stage],
        transport: Transport,
        *,
        receive_ahead: int = 1,
        max_unsharded: int = 2,
        title: str = "",
    ) -> None:
        """Lowers the schedule and checks that it comes to its end.

        Args:
            schedule: the schedule, the same on all ranks; if it has no messages, they are added.
            rank: pipeline rank of this process.
            stages: the stages of this rank, by index.
            transport: moves values between ranks.
            receive_ahead: how many computations before its use a message may arrive.
            max_unsharded: how many stages of this rank may be gathered at the same time.
            title: what errors call this rank. Default: `rank` and its number in the pipeline.

        Raises:
            ScheduleError: the schedule deadlocks or is incomplete.
            ValueError: other stages than the schedule has on this rank.
        """
        if not schedule.communicates:
            sharded = any(stage.shardable is not None for stage in stages.values())
            schedule = lower(
                schedule, receive_ahead=receive_ahead, sharded=sharded, max_unsharded=max_unsharded
            )
        simulate(schedule)
        if tuple(sorted(stages)) != schedule.stages_of(rank):
            raise ValueError(
                f"schedule {schedule.name} has stages {list(schedule.stages_of(rank))} on rank {rank}, given are "
                f"{sorted(stages)}"
            )
        self.schedule, self.rank = schedule, rank
        self._title = title or f"rank {rank}"
        self._stages, self._transport = dict(stages), transport
        self._row = tuple(leaf for action in schedule.actions[rank] for leaf in action.leaves())
        # The last computation that adds to a stage's gradients.
        self._last = {
            leaf.stage: leaf
            for leaf in computations(self._row)
            if leaf.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
        }
        for stage in self._stages.values():
            if stage.split_refusal:  # then the gradients come with the first part
                index = stage.index
                firsts = [
                    a for a in self._row if a.stage == index and a.op in (Op.BACKWARD, Op.BACKWARD_INPUT)
                ]
                self._last.update({index: firsts[-1]} if firsts else {})
        self._share_controls()
        self._steps = 0

    def step(
        self,
        inputs: Sequence[Any] | None = None,
        targets: Sequence[Any] | None = None,
        *,
        loss_weights: Sequence[float | Tensor] | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
        keep_outputs: bool = False,
        measure: bool = False,
    ) -> StepResult:
        """Runs all micro-batches: adds gradients to `.grad`, or only computes outputs if the schedule does not train.

        Args:
            inputs: the inputs of every micro-batch, on the rank of the first stage.
            targets: the targets of every micro-batch, on the rank of the last stage, if that has a loss function.
            loss_weights: factors of the micro-batches' losses, on the rank of the last stage; for example the share of
                each one's tokens. Default: losses are divided by the number of micro-batches.
            scale: called with each loss after that, before its backward; for example a loss scaler.
            keep_outputs: return the outputs of the last stage.
            measure: return when each action ran.

        Raises:
            PipelineError: a stage has failed, on this rank or on another; the message names stage, micro-batch and
                action. The executor cannot be used afterwards.
            ValueError: the number of inputs, targets or weights is not that of the micro-batches.
        """
        step = _Step(inputs, targets, loss_weights, scale, keep_outputs)
        self._check_given(step)
        spans: list[Span] = []
        with torch.set_grad_enabled(self.schedule.trains):
            self._set_sync(False)
            for action in self._row:
                start = time.perf_counter() if measure else 0.0
                self._run_reported(step, action)
                if measure:
                    spans += self._span(action, start)
        self._steps += 1
        return StepResult(
            losses=tuple(step.losses[m] for m in sorted(step.losses)),
            outputs=tuple(step.outputs[m] for m in sorted(step.outputs)),
            spans=tuple(spans),
        )

    def finish(self) -> None:
        """Waits until all ranks have finished their step, before collectives that a failed rank would never join.

        Raises:
            PipelineError: a rank has failed.
        """
        try:
            self._transport.finish()
        except PipelineError as error:
            raise PipelineError(f"{self._title}, at the end of the step: {error}") from error

    @contextmanager
    def agreeing(self, end: Callable[[], None]) -> Iterator[None]:
        """Returns a context for a collective of all ranks after their last action, which takes the place of `finish`.

        Args:
            end: ends what this rank waits for in the collective; called, from another thread, if a rank has failed.

        Raises:
            PipelineError: a rank has failed.
        """
        try:
            with self._transport.watched(end):
                yield
        except PipelineError as error:
            message = f"{self._title}, at the end of the step: {error}"
            self._transport.fail(message)
            raise PipelineError(message) from error

    def fail(self, message: str) -> None:
        """Tells all ranks that this one cannot go on. The executor cannot be used afterwards."""
        self._transport.fail(message)

    def close(self) -> None:
        """Ends what runs in the background."""
        for stage in self._stages.values():
            stage.forget()
        self._transport.close()

    def _share_controls(self) -> None:
        """Of stages with one control, only the last computation completes the gradients."""
        order = {leaf: i for i, leaf in enumerate(self._row)}
        latest: dict[int, int] = {}
        for index, leaf in self._last.items():
            control = id(self._stages[index].shardable)
            latest[control] = max(latest.get(control, -1), order[leaf])
        self._last = {
            index: leaf
            for index, leaf in self._last.items()
            if order[leaf] == latest[id(self._stages[index].shardable)]
        }

    def _check_given(self, step: _Step) -> None:
        count = self.schedule.num_microbatches
        last = self._stages.get(self.schedule.num_stages - 1)
        wanted = {
            "inputs": (step.inputs, 0 in self._stages),
            "targets": (step.targets, last is not None and last.loss_fn is not None and self.schedule.trains),
            "loss_weights": (step.weights, False),
        }
        for name, (given, needed) in wanted.items():
            if given is None and needed:
                raise ValueError(f"{self._title} needs {name}, one for each of {count} micro-batches")
            if given is not None and len(given) != count:
                raise ValueError(f"{len(given)} {name} for {count} micro-batches")

    def _run_reported(self, step: _Step, action: Action) -> None:
        """Runs an action; an error is told to all ranks."""
        try:
            self._run(step, action)
        except PipelineError as error:
            message = f"{self._title} stopped at {_described(action)}: {error}"
            self._transport.fail(message)
            raise PipelineError(message) from error
        except BaseException as error:
            message = f"{self._title} failed at {_described(action)}: {type(error).__name__}: {error}"
            first = self._transport.fail(message)
            if isinstance(error, Exception):
                # A collective with a rank that has failed is an error here, too: the cause is what that one has told.
                raise PipelineError(
                    message if first in message else f"{message}; before that, {first}"
                ) from error
            raise

    def _run(self, step: _Step, action: Action) -> None:
        stage = self._stages[action.stage]
        if action.op is Op.FORWARD:
            self._forward(step, stage, action)
        elif action.op in (Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
            self._backward(step, stage, action)
        elif action.op.sends:
            forward = action.op is Op.SEND_FORWARD
            other = action.stage + (1 if forward else -1)
            label = Action(other, Op.RECV_FORWARD if forward else Op.RECV_BACKWARD, action.microbatch)
            self._transport.send(self.schedule.rank_of_stage[other], label, step.to_send.pop(label))
        elif action.op.receives:
            self._transport.expect(self._source(action), action)
        elif stage.shardable is None:
            return
        elif action.op is Op.UNSHARD:
            step.gathers[stage.index] = stage.shardable.unshard(async_op=True)
        elif action.op is Op.RESHARD:
            stage.shardable.reshard()
        elif isinstance(stage.shardable, ReducesGradients):
            stage.shardable.reduce_gradients()

    def _source(self, receive: Action) -> int:
        other = receive.stage + (-1 if receive.op is Op.RECV_FORWARD else 1)
        return self.schedule.rank_of_stage[other]

    def _forward(self, step: _Step, stage: Stage, action: Action) -> None:
        index, m = stage.index, action.microbatch
        assert m is not None
        self._gathered(step, index)
        if index == 0:
            assert step.inputs is not None
            value = step.inputs[m]
        elif (index, m) in step.values:
            value = step.values.pop((index, m))
        else:
            receive = Action(index, Op.RECV_FORWARD, m)
            value = self._transport.receive(self._source(receive), receive)
        if index + 1 < self.schedule.num_stages:
            output = stage.forward(m, value)
            self._hand_on(step, step.values, Action(index + 1, Op.RECV_FORWARD, m), output)
            return
        if not self.schedule.trains and step.targets is None:
            step.outputs[m] = stage.compute(value)
            return
        target = None if step.targets is None else step.targets[m]
        output, loss = stage.last_forward(m, value, target, lambda loss: self._weighted(step, m, loss))
        if loss is not None:
            step.losses[m] = loss.detach()
        if step.keep_outputs:
            step.outputs[m] = detached(output)

    def _weighted(self, step: _Step, m: int, loss: Tensor) -> Tensor:
        part = loss / self.schedule.num_microbatches if step.weights is None else loss * step.weights[m]
        return part if step.scale is None else step.scale(part)

    def _backward(self, step: _Step, stage: Stage, action: Action) -> None:
        index, m = stage.index, action.microbatch
        assert m is not None
        self._gathered(step, index)
        if self._last.get(index) == action and stage.shardable is not None:
            stage.shardable.set_requires_gradient_sync(True)
        if action.op is Op.BACKWARD_WEIGHT:
            stage.backward_weight(m)
            return
        if index + 1 == self.schedule.num_stages:
            gradients: list[Tensor | None] = [None]
        elif (index, m) in step.gradients:
            gradients = step.gradients.pop((index, m))
        else:
            receive = Action(index, Op.RECV_BACKWARD, m)
            gradients = self._transport.receive(self._source(receive), receive)
        run = stage.backward if action.op is Op.BACKWARD else stage.backward_input
        result = run(m, gradients)
        if index > 0:
            self._hand_on(step, step.gradients, Action(index - 1, Op.RECV_BACKWARD, m), result)

    def _hand_on(self, step: _Step, local: dict[tuple[int, int], Any], label: Action, value: Any) -> None:
        """To another stage of this rank, or to the send that follows."""
        if self.schedule.rank_of_stage[label.stage] == self.rank:
            assert label.microbatch is not None
            local[label.stage, label.microbatch] = value
        else:
            step.to_send[label] = value

    def _gathered(self, step: _Step, index: int) -> None:
        work = step.gathers.pop(index, None)
        if work is not None:
            work.wait()

    def _set_sync(self, required: bool) -> None:
        for stage in self._stages.values():
            if stage.shardable is not None and self.schedule.trains:
                stage.shardable.set_requires_gradient_sync(required)

    def _span(self, action: Action, start: float) -> list[Span]:
        if not action.op.computes:
            return []
        end = time.perf_counter()
        return [Span(rank=self.rank, step=self._steps, action=action, start=start, end=end)]


def _described(action: Action) -> str:
    microbatch = "" if action.microbatch is None else f"micro-batch {action.microbatch}, "
    return f"stage {action.stage}, {microbatch}{_WORDS[action.op]} ({action})"
