"""Runs a schedule with given costs, without computing anything.

[Note: simulation]
Each rank runs its actions in order; an action starts when its rank is free and what it needs has been computed or has
arrived. So all times follow from the schedule alone, whatever the order in which the simulator looks at ranks. If no
rank can go on, each waits for another: `deadlock` prints the cycle.

Sends and receives never block, as in the executor: a message is transferred once it has been sent, its receive has
started and the messages before it on the same link have been transferred. A schedule without sends and receives is
simulated as if each message were sent and received as soon as possible.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ds_pipe.actions import Action, Op
from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.schedule import Schedule, check
from ds_pipe.simulate.costs import Costs
from ds_pipe.simulate.deadlock import deadlock
from ds_pipe.simulate.results import Simulation, Span

Event = tuple[int, Action]
"""What an action may wait for: (index of the step, an action that has run, or a receive whose message has arrived)."""


def simulate(schedule: Schedule, costs: Costs | None = None, *, steps: int = 1) -> Simulation:
    """Simulates one or several steps.

    Args:
        schedule: a schedule, with or without sends and receives.
        costs: costs of its stages. None: `Costs.uniform`.
        steps: number of steps that follow each other, without a barrier in between.

    Raises:
        DeadlockError: ranks wait for each other; the message prints the cycle.
        ScheduleError: the schedule is incomplete, or messages between two ranks are received in another order than they
            are sent.
    """
    check(schedule)
    costs = Costs.uniform(schedule.num_stages) if costs is None else costs
    if len(costs.stages) != schedule.num_stages:
        raise ScheduleError(f"costs of {len(costs.stages)} stages for a schedule of {schedule.num_stages}")
    if steps < 1:
        raise ScheduleError(f"steps={steps}: at least one step is simulated")
    return _Run(schedule, costs, steps).run()


@dataclass
class _Rank:
    """The state of one rank."""

    program: list[tuple[int, Action]]
    """(index of the step, action) in order; overlaps are taken apart."""
    position: int = 0
    clock: float = 0.0
    background: float = 0.0
    """When its gathers and reductions are done."""
    kept: int = 0
    kept_bytes: int = 0
    peak: int = 0
    peak_bytes: int = 0
    sent_bytes: int = 0
    spans: list[Span] = field(default_factory=list)


@dataclass
class _Link:
    """Messages from one rank to another, in order."""

    sent: deque[tuple[Event, float]] = field(default_factory=deque)
    expected: deque[tuple[Event, float]] = field(default_factory=deque)
    free: float = 0.0


class _Run:
    def __init__(self, schedule: Schedule, costs: Costs, steps: int) -> None:
        self._schedule, self._costs, self._steps = schedule, costs, steps
        self._explicit = schedule.communicates
        self._done: dict[Event, float] = {}
        self._links: dict[tuple[int, int], _Link] = {}
        self._ranks = [
            _Rank([(step, leaf) for step in range(steps) for action in row for leaf in action.leaves()])
            for row in schedule.actions
        ]
        self._trains = schedule.trains

    def run(self) -> Simulation:
        moved = True
        while moved:
            moved = False
            for index, rank in enumerate(self._ranks):
                while rank.position < len(rank.program) and self._run_next(index, rank):
                    moved = True
        stuck = {
            i: (r.position, [n for n in self._needs(i, *r.program[r.position]) if n not in self._done])
            for i, r in enumerate(self._ranks)
            if r.position < len(r.program)
        }
        if stuck:
            raise deadlock(self._schedule, [r.program for r in self._ranks], stuck)
        return Simulation(
            schedule=self._schedule,
            steps=self._steps,
            spans=tuple(span for rank in self._ranks for span in rank.spans),
            peak_activations=tuple(rank.peak for rank in self._ranks),
            peak_activation_bytes=tuple(rank.peak_bytes for rank in self._ranks),
            resident_bytes=tuple(
                sum(self._costs.stages[s].resident_bytes for s in self._schedule.stages_of(r))
                for r in range(len(self._ranks))
            ),
            sent_bytes=tuple(rank.sent_bytes for rank in self._ranks),
        )

    def _run_next(self, index: int, rank: _Rank) -> bool:
        step, action = rank.program[rank.position]
        needs = self._needs(index, step, action)
        if any(event not in self._done for event in needs):
            return False
        start = max([rank.clock, *(self._done[event] for event in needs)])
        rank.position += 1
        if action.op.computes:
            self._compute(index, rank, step, action, start)
        elif action.op.sends or action.op.receives:
            rank.clock = start
            self._communicate(index, step, action, start)
        else:
            self._background(index, rank, step, action, start)
        return True

    def _compute(self, index: int, rank: _Rank, step: int, action: Action, start: float) -> None:
        stage = self._costs.stages[action.stage]
        end = start + self._costs.action_s + stage.seconds(action.op)
        rank.clock = end
        rank.spans.append(Span(rank=index, step=step, action=action, start=start, end=end))
        self._done[step, action] = end
        self._keep(rank, action)
        target = self._target(action)
        if target is not None:
            rank.sent_bytes += self._message_bytes(action)
            if not self._explicit:
                self._send(index, (step, target), end)
                self._expect(self._schedule.rank_of_stage[target.stage], index, (step, target), 0.0)

    def _keep(self, rank: _Rank, action: Action) -> None:
        stage = self._costs.stages[action.stage]
        if not self._trains:
            return
        if action.op is Op.FORWARD:
            rank.kept += 1
            rank.kept_bytes += stage.activation_bytes
            rank.peak = max(rank.peak, rank.kept)
            rank.peak_bytes = max(rank.peak_bytes, rank.kept_bytes)
        elif action.op is Op.BACKWARD_INPUT:
            rank.kept_bytes -= stage.activation_bytes - stage.between_bytes
        else:
            rank.kept -= 1
            whole = action.op is Op.BACKWARD
            rank.kept_bytes -= stage.activation_bytes if whole else stage.between_bytes

    def _communicate(self, index: int, step: int, action: Action, now: float) -> None:
        if action.op.sends:
            forward = action.op is Op.SEND_FORWARD
            op = Op.RECV_FORWARD if forward else Op.RECV_BACKWARD
            target = Action(action.stage + (1 if forward else -1), op, action.microbatch)
            self._send(index, (step, target), now)
        else:
            source = action.stage + (-1 if action.op is Op.RECV_FORWARD else 1)
            self._expect(index, self._schedule.rank_of_stage[source], (step, action), now)

    def _background(self, index: int, rank: _Rank, step: int, action: Action, start: float) -> None:
        stage = self._costs.stages[action.stage]
        seconds = {Op.UNSHARD: stage.unshard_s, Op.REDUCE_GRAD: stage.reduce_s}.get(action.op, 0.0)
        begin = max(start, rank.background)
        rank.clock, rank.background = start, begin + seconds
        self._done[step, action] = begin + seconds
        if seconds:
            rank.spans.append(Span(rank=index, step=step, action=action, start=begin, end=begin + seconds))

    def _needs(self, index: int, step: int, action: Action) -> list[Event]:
        """What has to be done before an action starts, besides the earlier actions of its rank."""
        stage, m, ranks = action.stage, action.microbatch, self._schedule.rank_of_stage
        needs: list[Event] = []
        if action.op is Op.FORWARD and stage > 0:
            local = ranks[stage - 1] == index
            needs.append((step, Action(*((stage - 1, Op.FORWARD) if local else (stage, Op.RECV_FORWARD)), m)))
        if action.op in (Op.BACKWARD, Op.BACKWARD_INPUT) and stage + 1 < len(ranks):
            if ranks[stage + 1] != index:
                needs.append((step, Action(stage, Op.RECV_BACKWARD, m)))
            else:
                whole = Action(stage + 1, Op.BACKWARD, m)
                split = Action(stage + 1, Op.BACKWARD_INPUT, m)
                needs.append((step, whole if (step, whole) in self._done else split))
        unshard = (step, Action(stage, Op.UNSHARD))
        if action.op.computes and unshard in self._done:
            needs.append(unshard)
        return needs

    def _target(self, action: Action) -> Action | None:
        """The receive at another rank that takes the result of a computation."""
        stage, ranks = action.stage, self._schedule.rank_of_stage
        if action.op is Op.FORWARD and stage + 1 < len(ranks) and ranks[stage + 1] != ranks[stage]:
            return Action(stage + 1, Op.RECV_FORWARD, action.microbatch)
        backward = action.op in (Op.BACKWARD, Op.BACKWARD_INPUT)
        if backward and stage > 0 and ranks[stage - 1] != ranks[stage]:
            return Action(stage - 1, Op.RECV_BACKWARD, action.microbatch)
        return None

    def _message_bytes(self, action: Action) -> int:
        """Activations and their gradients have the size of the output of the earlier stage."""
        return self._costs.stages[action.stage - (action.op is not Op.FORWARD)].output_bytes

    def _send(self, source: int, event: Event, now: float) -> None:
        target = self._schedule.rank_of_stage[event[1].stage]
        self._links.setdefault((source, target), _Link()).sent.append((event, now))
        self._transfer(source, target)

    def _expect(self, target: int, source: int, event: Event, now: float) -> None:
        self._links.setdefault((source, target), _Link()).expected.append((event, now))
        self._transfer(source, target)

    def _transfer(self, source: int, target: int) -> None:
        link = self._links[source, target]
        while link.sent and link.expected:
            (event, sent), (expected, posted) = link.sent.popleft(), link.expected.popleft()
            if event != expected:
                raise ScheduleError(
                    f"rank {target} expects {expected[1]} from rank {source}, whose next message is for {event[1]}: "
                    "between two ranks, receives have to start in the order of the sends"
                )
            sender = event[1].stage - (event[1].op is Op.RECV_FORWARD)
            begin = max(sent, posted, link.free)
            link.free = begin + self._costs.stages[sender].output_bytes / self._costs.bytes_per_s
            self._done[event] = link.free + self._costs.latency_s
