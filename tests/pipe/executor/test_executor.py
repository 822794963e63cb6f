"""The executor, with all ranks as threads of one process: training has the bits of training without a pipeline."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ds_pipe import NAMES, Schedule, make, simulate
from ds_pipe.executor import Executor, MemoryHub, Stage, StageOptions
from pipe.executor.models import (
    batches,
    in_threads,
    own_stages,
    stages,
    trained_alone,
    trained_in_threads,
)

TRAINING = [name for name in NAMES if name != "inference"]
CASES = [
    pytest.param(name, ranks, m, marks=[] if (ranks, m) in ((2, 4), (4, 8)) else pytest.mark.full)
    for name, ranks, m in itertools.product(TRAINING, (1, 2, 3, 4), (4, 7, 8))
    if name != "dualpipev" or m >= 2 * ranks
]


def same_weights(ours, theirs):
    return all(
        torch.equal(a, b)
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x.parameters(), y.parameters(), strict=True)
    )


@pytest.mark.parametrize("name, ranks, m", CASES)
def test_losses_and_weights_are_those_of_one_process(name, ranks, m):
    schedule = make(name, ranks, m)
    ours, alone = stages(schedule.num_stages), stages(schedule.num_stages)
    assert trained_in_threads(schedule, ours, 10) == trained_alone(alone, 10, m)
    assert same_weights(ours, alone)


@pytest.mark.parametrize("name", ["zb-h1", "zb-v"])
def test_without_split_backward_too(name):
    schedule = make(name, 2, 4)
    ours, alone = stages(schedule.num_stages), stages(schedule.num_stages)
    options = StageOptions(split_backward=False)
    assert trained_in_threads(schedule, ours, 3, options=options) == trained_alone(alone, 3, 4)
    assert same_weights(ours, alone)


def test_a_schedule_that_deadlocks_is_refused_before_it_runs():
    broken = Schedule.parse("0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0")
    parts = stages(2)
    with pytest.raises(ValueError, match="wait for each other"):
        Executor(broken, 0, own_stages(broken, 0, parts), MemoryHub(2).transport(0))


def test_stages_of_another_rank_are_refused():
    schedule = make("1f1b", 2, 4)
    with pytest.raises(ValueError, match=r"has stages \[0\] on rank 0, given are \[1\]"):
        Executor(schedule, 0, own_stages(schedule, 1, stages(2)), MemoryHub(2).transport(0))


def test_too_few_inputs_are_refused():
    schedule = make("1f1b", 1, 4)
    executor = Executor(schedule, 0, own_stages(schedule, 0, stages(1)), MemoryHub(1).transport(0))
    inputs, targets = batches(4)
    with pytest.raises(ValueError, match="3 inputs for 4 micro-batches"):
        executor.step(inputs[:3], targets)
    with pytest.raises(ValueError, match="needs targets"):
        executor.step(inputs)


class Labelled(nn.Module):
    """Passes tuples, dicts, integers and text, of which only one tensor needs a gradient."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.weight = index, nn.Parameter(torch.full((3,), 1.0 + index))

    def forward(self, value):
        if self.index == 0:
            value = {"x": value, "mask": value > 0, "trace": ("begin", [])}
        trace = (value["trace"][0], [*value["trace"][1], self.index])
        x = value["x"] * self.weight
        if self.index == 2:
            return x.sum() * value["mask"].sum()
        return {"x": x, "mask": value["mask"], "trace": trace, "pair": (x.detach(), None)}


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_dicts_tuples_masks_text_and_shapes_that_change(name):
    schedule = make(name, 3, 4)
    parts, alone = [Labelled(i) for i in range(3)], [Labelled(i) for i in range(3)]
    inputs = [torch.randn(2 + i, 3) for i in range(4)]
    hub = MemoryHub(3)

    def body(rank):
        executor = Executor(schedule, rank, {rank: Stage(parts[rank], rank)}, hub.transport(rank))
        return executor.step(inputs).losses

    losses = in_threads(3, body)[2]
    for x, loss in zip(inputs, losses, strict=True):
        for part in alone:
            x = part(x)
        assert torch.equal(x, loss)
        (x / 4).backward()
    assert all(torch.equal(a.weight.grad, b.weight.grad) for a, b in zip(parts, alone, strict=True))


def test_weighted_losses_are_those_of_all_tokens_together():
    """Micro-batches with different numbers of tokens: weights make the loss the mean over tokens (a peer counted each
    micro-batch the same)."""
    schedule = make("1f1b", 2, 2)
    tokens = [torch.randint(0, 11, (1, 3)), torch.randint(0, 11, (1, 9))]
    ours, alone = stages(2), stages(2)
    hub = MemoryHub(2)

    def body(rank):
        executor = Executor(schedule, rank, own_stages(schedule, rank, ours), hub.transport(rank))
        executor.step(tokens, tokens, loss_weights=[3 / 12, 9 / 12])

    in_threads(2, body)
    total = sum(
        nn.functional.cross_entropy(alone[1](alone[0](t)).flatten(0, 1), t.flatten(), reduction="sum")
        for t in tokens
    )
    (total / 12).backward()
    for a, b in zip(ours, alone, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_each_output_meets_the_targets_of_its_own_micro_batch():
    schedule = make("interleaved", 2, 8)
    seen = []

    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.w

    def compare(output, target):
        seen.append((output.item(), target))
        return output.sum()

    hub = MemoryHub(2)

    def body(rank):
        own = {s: Stage(Add(), s, loss_fn=compare if s == 3 else None) for s in schedule.stages_of(rank)}
        Executor(schedule, rank, own, hub.transport(rank)).step(
            [torch.tensor([float(m)]) for m in range(8)], range(8)
        )

    in_threads(2, body)
    assert len(seen) == 8 and all(x == y for x, y in seen)


@pytest.mark.parametrize("chunks", [1, 2])
def test_inference_gives_outputs_and_keeps_nothing(chunks):
    schedule = make("inference", 2, 5, chunks=chunks)
    parts = stages(schedule.num_stages)
    inputs, targets = batches(5)
    hub = MemoryHub(2)

    def body(rank):
        own = own_stages(schedule, rank, parts)
        executor = Executor(schedule, rank, own, hub.transport(rank))
        plain = executor.step(inputs)
        evaluated = executor.step(inputs, targets)
        assert not any(stage.num_kept for stage in own.values())
        return plain.outputs, evaluated.losses

    outputs, losses = in_threads(2, body)[1]
    for x, y, output, loss in zip(inputs, targets, outputs, losses, strict=True):
        for part in parts:
            x = part(x)
        assert torch.equal(x, output) and not output.requires_grad
        assert torch.equal(nn.functional.cross_entropy(x.flatten(0, 1), y.flatten()), loss)


def test_stages_keep_as_many_activations_as_the_simulator_says():
    schedule = make("zb-v", 3, 7)
    parts = stages(6)
    hub = MemoryHub(3)

    def body(rank):
        own = own_stages(schedule, rank, parts)
        most = 0

        def note(*_):
            nonlocal most
            most = max(most, 1 + sum(stage.num_kept for stage in own.values()))

        for stage in own.values():
            stage.module.register_forward_hook(note)
        Executor(schedule, rank, own, hub.transport(rank)).step(*batches(7))
        return most

    assert tuple(in_threads(3, body)) == simulate(schedule).peak_activations


def test_a_measured_run_has_one_span_for_each_computation():
    schedule = make("1f1b", 2, 4)
    parts, hub = stages(2), MemoryHub(2)

    def body(rank):
        executor = Executor(schedule, rank, own_stages(schedule, rank, parts), hub.transport(rank))
        return executor.step(*batches(4), measure=True).spans

    for rank, spans in enumerate(in_threads(2, body)):
        assert [span.action for span in spans] == list(schedule.actions[rank])
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))


class Control:
    """Notes what the executor asks for."""

    def __init__(self):
        self.calls = []

    def unshard(self, async_op=False):
        self.calls.append("unshard")

    def reshard(self):
        self.calls.append("reshard")

    def set_requires_gradient_sync(self, requires_gradient_sync, *, recurse=True):
        self.calls.append(f"sync {requires_gradient_sync}")

    def reduce_gradients(self):
        self.calls.append("reduce")


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_a_sharded_stage_is_gathered_dropped_and_reduced_once(name):
    schedule = make(name, 2, 3)
    parts, hub, controls = stages(2), MemoryHub(2), [Control(), Control()]

    def body(rank):
        own = own_stages(schedule, rank, parts, shardable=controls[rank])
        stage = own[rank]
        run, run_weight = stage.backward, stage.backward_weight

        def backward(m, gradients):
            controls[rank].calls.append(f"backward {m}")
            return run(m, gradients)

        def backward_weight(m):
            controls[rank].calls.append(f"backward {m}")
            run_weight(m)

        stage.backward, stage.backward_weight = backward, backward_weight
        Executor(schedule, rank, own, hub.transport(rank)).step(*batches(3))

    in_threads(2, body)
    for control in controls:
        calls = control.calls
        assert calls[0] == "sync False" and calls.count("unshard") == calls.count("reshard") == 1
        # The gradients of the last micro-batch are the ones with which the reduction comes.
        assert calls[calls.index("sync True") :][:2] == ["sync True", "backward 2"]
        assert calls.count("reduce") == 1 and calls.index("reduce") > calls.index("backward 2")
