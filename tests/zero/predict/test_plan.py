"""The plan is the counted peak, and what it proposes fits."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_core import optim
from ds_offload import CPUAdam
from ds_zero import _registry
from harness import ranks
from zero.models import Tiny, batch
from zero.planned import Gpt, Job

BF16 = torch.bfloat16
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
CHECKPOINTED = {"recompute": True, "tied": True}
SMALL = {"dim": 128, "layers": 1}

COMMON = [
    Job(stage=0, steps=3, optimizer=MOMENTUM),
    Job(stage=1, precision=BF16, optimizer=optim.FusedAdam),
    Job(stage=2, precision=BF16, steps=3),
    Job(stage=2, host=True, optimizer=CPUAdam, model={"recompute": True}, batch=8),
    Job(stage=3),
    Job(stage=3, precision=BF16, host=True, optimizer=CPUAdam, steps=2, accumulation="local"),
]
OTHERS = [
    Job(stage=0),
    Job(stage=0, precision=BF16, clip=False),
    Job(stage=1),
    Job(stage=1, precision=BF16, steps=3, accumulation="sharded"),
    Job(stage=1, model=CHECKPOINTED, batch=8),
    Job(stage=1, host=True, optimizer=CPUAdam),
    Job(stage=2),
    Job(stage=2, steps=3, accumulation="local", optimizer=torch.optim.RMSprop),
    Job(stage=2, precision=BF16, config={"reduce_bucket_numel": 100_000}),
    Job(stage=3, precision=BF16),
    Job(stage=3, steps=2),
    Job(stage=3, precision=BF16, model=CHECKPOINTED, batch=8),
    Job(stage=3, steps=3, accumulation="local", precision=BF16, optimizer=MOMENTUM),
    Job(
        stage=3,
        optimizer=optim.FusedLion,
        config={"persistence_threshold_numel": 0, "prefetch": False},
    ),
]


FP16 = Job(stage=2, precision=torch.float16, steps=2, scaled=True, optimizer=optim.FusedAdam)
TOPOLOGIES = [
    Job(stage=3, precision=BF16, config={"secondary_ranks": 2}),
    Job(stage=2, precision=BF16, shard_ranks=2),
    Job(stage=3, shard_ranks=2, steps=2),
    Job(stage=3, precision=BF16, shard_ranks=1),
    Job(stage=2, expert_ranks=2),
    Job(stage=3, precision=BF16, expert_ranks=1),
    Job(stage=3, precision=torch.float16, scaled=True),
]


def check(job: Job) -> None:
    """The peak is within 3% of what is counted and never below it; phases are near theirs."""
    counted = job.count()
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    plan = job.plan(dist.get_world_size() if dist.is_initialized() else 1)
    assert counted.peak_bytes <= plan.device_bytes <= 1.03 * counted.peak_bytes, (
        f"planned {plan.device_bytes}, counted {counted.phase_bytes}\n{plan}"
    )
    for phase in plan.phases:
        found = counted.phase_bytes[phase.phase]
        assert 0.99 * found <= phase.device_bytes <= 1.2 * found, phase
        assert sum(phase.parts.values()) + plan.reserve_bytes == phase.device_bytes
    if job.host:
        assert 0 < plan.host_bytes < plan.device_bytes


@ranks(2)
@pytest.mark.parametrize("job", COMMON)
def test_the_plan_is_the_counted_peak(job: Job) -> None:
    check(job)


@ranks(2)
def test_the_plan_is_the_counted_peak_with_a_loss_scaler() -> None:
    check(FP16)


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("job", [TOPOLOGIES[0], pytest.param(TOPOLOGIES[1], marks=pytest.mark.full)])
def test_the_plan_is_the_counted_peak_on_nearer_and_on_equal_ranks(job: Job) -> None:
    check(job)


@pytest.mark.full
@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("job", TOPOLOGIES[2:])
def test_the_plan_is_the_counted_peak_on_other_topologies(job: Job) -> None:
    check(job)


@pytest.mark.full
@ranks(2)
@pytest.mark.parametrize("job", OTHERS)
def test_the_plan_is_the_counted_peak_everywhere(job: Job) -> None:
    check(job)


@pytest.mark.full
@ranks(1, 4)
@pytest.mark.parametrize("job", COMMON)
def test_the_plan_is_the_counted_peak_on_other_numbers_of_ranks(job: Job) -> None:
    check(job)


@ranks(2)
@pytest.mark.parametrize("precision", [None, BF16])
def test_states_between_steps_are_those_that_memory_counts(precision: torch.dtype | None) -> None:
    for stage in range(4):
        model = Tiny(extras=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        config = ds_zero.ZeroConfig(param_dtype=precision)
        planned = ds_zero.plan(model, stage=stage, ranks=2, optimizer=optimizer, config=config, device="cpu")
        ds_zero.shard(model, optimizer, stage, config=config)
        model(*batch(0, 0)).backward()
        optimizer.step()
        found = ds_zero.memory(model, optimizer)
        parts = planned.phases[0].parts
        if dist.get_rank() == 0:
            assert parts["parameters"] + parts["masters"] == found.params_bytes + found.masters_bytes
            assert parts["gradients"] == found.grads_bytes
            assert parts["buffers"] == found.buffers_bytes
            # parameters that were never used have no state
            unused = 8 * 42
            assert parts["states"] - unused <= found.optimizer_bytes <= parts["states"]


def test_replicas_of_whole_parameters_are_planned() -> None:
    planned = Job(stage=3, precision=BF16, shard_ranks=1, model=SMALL).plan(4)
    assert planned.sent_bytes["forward"] == 0
    assert planned.sent_bytes["backward"] > 0


def test_messages_are_those_of_the_formula() -> None:
    numel = sum(p.numel() for p in Gpt(**SMALL).parameters())
    payload = 4 * numel * 3 / 4  # of 4 ranks, each sends three quarters
    for stage, times in ((0, 2), (1, 2), (2, 2), (3, 3)):
        sent = Job(stage=stage, model=SMALL, optimizer=optim.FusedAdam).plan(4).sent_bytes
        kept = (
            0.7 if stage == 3 else 1.0
        )  # the last unit of so small a model is most of it, and is not gathered twice
        assert times * payload * 0.95 * kept <= sum(sent.values()) <= times * payload * 1.03
    for steps in (3, 9):  # plans run at most four micro-batches
        assert sum(Job(stage=2, steps=steps, model=SMALL).plan(4).sent_bytes.values()) == pytest.approx(
            (steps + 1) * payload, rel=0.03
        )


def test_planning_changes_nothing_and_needs_no_memory() -> None:
    with torch.device("meta"):
        model = Gpt(4096, 6)
    seen = {name: (id(p), p.device.type) for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, random = Job(stage=2).inputs(), torch.get_rng_state()
    plan = ds_zero.plan(model, inputs, stage=3, ranks=8, optimizer=optimizer, device="cpu")
    assert plan.device_bytes > 1 << 28
    assert {name: (id(p), p.device.type) for name, p in model.named_parameters()} == seen
    assert not optimizer.state and optimizer.param_groups[0]["params"][0] is next(model.parameters())
    assert _registry.find(model) is None and not model._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random)
    assert plan.phase("load").device_bytes < plan.params_numel * 4, "a deferred model is never whole"


def test_models_given_as_functions_with_hooks_and_tensors_of_their_own() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)
            self.table = torch.arange(64.0)
            self.inner.register_forward_hook(lambda m, a, out: out * 2)
            self.constants = {"shift": torch.ones(64)}

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + self.table.to(x.device)) + self.constants["shift"].to(x.device)

    by_function = ds_zero.plan(Odd, torch.empty(8, 64), device="cpu", deferred=False)
    by_model = ds_zero.plan(Odd(), (torch.empty(8, 64),), device="cpu")
    assert by_function.phases == by_model.phases


def test_values_that_a_model_asks_for_are_guessed_and_said() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = self.first(x)
            chosen = (x[:, 0] > 0).nonzero().flatten()
            return self.first(x) + self.second(x[chosen]).sum()

    notes = ds_zero.plan(Routed(), torch.empty(8, 32), device="cpu").notes
    assert len(notes) == 2 and all("test_plan.py:" in note for note in notes)


BUDGETS = {
    "activations": (Job(stage=3, batch=32, optimizer=optim.FusedAdam, model=SMALL), 0.6),
    "states": (Job(stage=0, batch=1, optimizer=optim.FusedAdam, model=SMALL), 0.8),
}


@pytest.mark.parametrize("case", ["states", pytest.param("activations", marks=pytest.mark.full)])
def test_settings_that_are_proposed_fit_and_the_planned_ones_did_not(case: str) -> None:
    job, share = BUDGETS[case]
    budget = int(job.plan(2).device_bytes * share)
    plan = job.plan(2, budget_bytes=budget)
    assert plan.fits is False and "does not fit" in str(plan) and plan.remedies
    for remedy in plan.remedies:
        changed = copy.copy(job)
        options = dict(remedy.changes)
        for name in ("stage", "batch"):
            key = {"batch": "micro_batch"}.get(name, name)
            if key in options:
                object.__setattr__(changed, name, options.pop(key))
        again = changed.plan(int(options.pop("ranks", 2)), budget_bytes=budget, **options)  # type: ignore[call-overload]
        assert again.fits and again.device_bytes <= budget
        assert remedy.text in str(plan)
    assert job.plan(2, budget_bytes=10 * budget).fits


def test_an_accelerators_memory_and_the_hosts_are_told_apart() -> None:
    job = Job(stage=2, precision=BF16, optimizer=CPUAdam, model=SMALL)
    numel = sum(p.numel() for p in Gpt(**SMALL).parameters())
    kept, moved = (job.plan(2, device="cuda", offload=offload) for offload in (False, True))
    assert kept.host_bytes == 0
    at_rest = moved.phase("save").host_bytes
    assert at_rest == pytest.approx(16 * numel / 2, rel=0.05)  # masters, gradients and two states
    freed = kept.phase("save").device_bytes - moved.phase("save").device_bytes
    assert freed == pytest.approx(at_rest, rel=0.05)
    tight = job.plan(2, device="cuda", offload=False, budget_bytes=kept.device_bytes - at_rest // 2)
    assert tight.fits is False and "offload" in {name for r in tight.remedies for name in r.changes}


def test_json_and_table() -> None:
    plan = Job(stage=1).plan(2)
    read = json.loads(plan.to_json())
    assert read["device_bytes"] == plan.device_bytes and read["fits"] is None
    assert [p["phase"] for p in read["phases"]] == ["load", "forward", "backward", "step", "save"]
    text = str(plan)
    for word in (
        "parameters",
        "gradients",
        "states",
        "buckets",
        "activations",
        "backward",
        "stage 1",
        "2 ranks",
    ):
        assert word in text


def test_refusals() -> None:
    model = Tiny()
    with pytest.raises(ValueError, match="stages 0 to 3"):
        ds_zero.plan(model, stage=5)
    with pytest.raises(ValueError, match="ranks=0"):
        ds_zero.plan(model, ranks=0)
    with pytest.raises(ValueError, match="pass loss="):
        ds_zero.plan(Strange(), torch.empty(2, 4), device="cpu")
    with pytest.raises(ValueError, match="shard_ranks=3 does not divide ranks=4"):
        ds_zero.plan(model, ranks=4, shard_ranks=3)
    with pytest.raises(ValueError, match="it must be a divisor of 4"):
        ds_zero.plan(model, ranks=4, ranks_for=lambda name, _: 3)
    ds_zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    with pytest.raises(ValueError, match="sharded already"):
        ds_zero.plan(model)


class Strange(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> object:  # type: ignore[override]
        return {"out": super().forward(x)}
