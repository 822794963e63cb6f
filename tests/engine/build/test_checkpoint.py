"""Training goes on from a checkpoint as if nothing had happened, on any number of ranks, at any stage, in
any precision."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
import ds_zero
from ds_engine import CheckpointError, checkpoint
from engine import jobs
from harness import ranks

STAGES = [0, 1, 2, 3]
ONE_PLAN = "local"
"""Stages agree bitwise within an accumulation plan."""


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def job(stage: int, seed: int = 0, offload: str = "none", **more: Any) -> ds_engine.Engine:
    zero = {"stage": stage, "accumulation_plan": ONE_PLAN, "offload_optimizer": {"device": offload}}
    made = jobs.engine(seed=seed, zero_optimization=zero, **more)
    made.progress.write = lambda line: None
    return made


def logical_state(engine: ds_engine.Engine) -> dict[str, Tensor]:
    """fp32 parameters on rank 0."""
    return ds_zero.full_state_dict(engine.module)


@ranks(1, 2)
@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("stage", STAGES)
def test_resumed_training_is_bitwise_the_uninterrupted_one(tmp_path: Path, stage: int, offload: str) -> None:
    straight = job(stage, offload=offload)
    jobs.train(straight, 3)
    wanted = jobs.train(straight, 3, first=3)
    first = job(stage, offload=offload)
    jobs.train(first, 3)
    path = first.save_checkpoint(tmp_path, client_state={"epoch": 2})
    resumed = job(stage, seed=9, offload=offload)
    assert resumed.load_checkpoint(tmp_path) == (path, {"epoch": 2})
    assert (resumed.global_steps, resumed.global_samples, resumed.micro_steps) == (3, 48, 6)
    assert resumed.get_lr() == first.get_lr()
    assert jobs.train(resumed, 3, first=3) == wanted
    assert jobs.train(first, 3, first=3) == wanted  # saving changed nothing
    ends = logical_state(straight), logical_state(resumed)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def save_on_ranks(folder: Path, stage: int, offload: str, bf16: bool) -> None:
    engine = job(stage, offload=offload, bf16={"enabled": bf16}, train_batch_size=24)
    jobs.train(engine, 3)
    engine.save_checkpoint(folder / "saved")
    state = logical_state(engine)
    if dist.get_rank() == 0:
        torch.save(state, folder / "state.pt")


def load_on_ranks(folder: Path, stage: int, offload: str, bf16: bool) -> None:
    engine = job(stage, seed=5, offload=offload, bf16={"enabled": bf16}, train_batch_size=24)
    engine.load_checkpoint(folder / "saved")
    state = logical_state(engine)
    if dist.get_rank() == 0:
        wanted = torch.load(folder / "state.pt")
        assert state.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(state[name], value), name
    assert engine.global_steps == 3
    # Saved again from here, the logical content has not changed by a bit.
    engine.save_checkpoint(folder / "again")
    if dist.get_rank() == 0:
        same_content(folder / "saved", folder / "again")
    dist.barrier()
    assert all(np.isfinite(jobs.train(engine, 1, first=3)))


def same_content(a: Path, b: Path) -> None:
    with (
        checkpoint.Checkpoint(checkpoint.find(a, None)) as first,
        checkpoint.Checkpoint(checkpoint.find(b, None)) as second,
    ):
        assert first.manifest.tensors.keys() == second.manifest.tensors.keys()
        for fqn, states in first.manifest.tensors.items():
            assert states.keys() == second.manifest.tensors[fqn].keys(), fqn
            for state in states:
                assert torch.equal(first.tensor(fqn, state), second.tensor(fqn, state)), (fqn, state)


# A pairwise-covering choice of (ranks, stage, offload, bf16) at saving and loading; `full` has every pair of
# ranks and stages.
PAIRS = [
    ((1, 0, "none", False), (2, 3, "cpu", True)),
    ((2, 3, "none", False), (1, 1, "none", False)),
    ((2, 1, "cpu", True), (3, 2, "none", False)),
    ((3, 2, "none", True), (2, 0, "cpu", False)),
    ((3, 3, "cpu", False), (1, 2, "cpu", True)),
    ((1, 2, "none", True), (3, 3, "none", True)),
    ((2, 0, "cpu", False), (3, 1, "cpu", False)),
]
ALL = [
    ((a, s, "none", False), (b, t, "none", False))
    for a in (1, 2, 3, 4)
    for b in (1, 2, 3, 4)
    for s in STAGES
    for t in STAGES
]
Place = tuple[int, int, str, bool]


def reshard(request: pytest.FixtureRequest, folder: Path, saved: Place, loaded: Place) -> None:
    jobs.on_ranks(
        request, saved[0], save_on_ranks, folder=folder, stage=saved[1], offload=saved[2], bf16=saved[3]
    )
    jobs.on_ranks(
        request, loaded[0], load_on_ranks, folder=folder, stage=loaded[1], offload=loaded[2], bf16=loaded[3]
    )


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_resharding(request: pytest.FixtureRequest, tmp_path: Path, saved: Place, loaded: Place) -> None:
    reshard(request, tmp_path, saved, loaded)


@pytest.mark.full
@pytest.mark.parametrize(("saved", "loaded"), ALL)
def test_resharding_every_pair(
    request: pytest.FixtureRequest, tmp_path: Path, saved: Place, loaded: Place
) -> None:
    reshard(request, tmp_path, saved, loaded)


def test_another_optimizer_of_the_family_takes_the_states(tmp_path: Path) -> None:
    engine = job(1, offload="cpu")
    jobs.train(engine, 2)
    engine.save_checkpoint(tmp_path)
    raw = jobs.config(2)
    del raw["optimizer"]
    model = jobs.net()
    other, *_ = ds_engine.initialize(
        model=model,
        config=raw,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3),
    )
    other.load_checkpoint(tmp_path)
    assert engine.get_lr() == [0.01 / 4]
    assert other.get_lr() == [0.3 / 4]  # the schedule is where it was, over the rate of this run
    for name, value in logical_state(engine).items():
        assert torch.equal(logical_state(other)[name], value)
    jobs.train(other, 1)


class TestRandomGenerators:
    def draw(self) -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    def test_they_go_on(self, tmp_path: Path) -> None:
        engine = job(0)
        self.draw()
        engine.save_checkpoint(tmp_path)
        wanted = self.draw()
        engine.load_checkpoint(tmp_path)
        assert self.draw() == wanted
        state = torch.get_rng_state()
        engine.load_checkpoint(tmp_path, load_module_only=True)
        assert torch.equal(torch.get_rng_state(), state)


@ranks(2)
def test_every_rank_gets_its_own_generator_back(tmp_path: Path) -> None:
    engine = job(2)
    torch.manual_seed(100 + dist.get_rank())
    engine.save_checkpoint(tmp_path)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    engine.load_checkpoint(tmp_path)
    assert torch.equal(torch.rand(1), wanted)


def test_generators_of_another_rank_count_are_derived_and_said(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    jobs.on_ranks(request, 2, save_on_ranks, folder=tmp_path, stage=1, offload="none", bf16=False)
    drawn = []
    for _ in range(2):
        engine = job(0)
        lines: list[str] = []
        engine.progress.write = lines.append
        engine.load_checkpoint(tmp_path / "saved")
        assert "written on 2 ranks, loaded on 1: random generators are seeded anew" in lines[0]
        assert "restored from" in lines[1]
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


class TestWhatIsLoaded:
    def saved(self, folder: Path, **more: Any) -> ds_engine.Engine:
        engine = job(1, **more)
        jobs.train(engine, 4)
        engine.save_checkpoint(folder)
        return engine

    def test_module_only(self, tmp_path: Path) -> None:
        saved = self.saved(tmp_path)
        engine = job(3, seed=4)
        rates = engine.get_lr()
        lines: list[str] = []
        engine.progress.write = lines.append
        engine.load_checkpoint(tmp_path, load_module_only=True)
        # 7 trained parameters with 3 states each, one frozen, one buffer
        assert lines == [f"9 of 30 tensors restored from {tmp_path / 'global_step4'}"]
        assert (engine.global_steps, engine.get_lr()) == (0, rates)
        assert not any(engine.optimizer.state.values())
        for name, value in logical_state(saved).items():
            assert torch.equal(logical_state(engine)[name], value)

    def test_without_optimizer_states(self, tmp_path: Path) -> None:
        self.saved(tmp_path)
        engine = job(1, seed=4)
        engine.load_checkpoint(tmp_path, load_optimizer_states=False)
        assert engine.global_steps == 4 and not any(engine.optimizer.state.values())

    def test_without_the_schedule(self, tmp_path: Path) -> None:
        saved = self.saved(tmp_path)
        engine = job(1)
        engine.load_checkpoint(tmp_path, load_lr_scheduler_states=False)
        assert engine.get_lr() == saved.get_lr()  # the groups' own option
        jobs.train(engine, 1)
        assert engine.get_lr() == [0.0]  # the schedule begins anew

    def test_another_accumulation_counts_in_its_own_micro_batches(self, tmp_path: Path) -> None:
        self.saved(tmp_path)
        engine = job(1, gradient_accumulation_steps=4)
        engine.load_checkpoint(tmp_path)
        assert engine.micro_steps == 16 and not engine.is_gradient_accumulation_boundary()

    def test_a_schedule_that_is_not_there_warns(self, tmp_path: Path) -> None:
        self.saved(tmp_path)
        with pytest.warns(UserWarning, match=r"the checkpoint has a schedule, but this engine has none"):
            job(1, scheduler=None).load_checkpoint(tmp_path)
        other = {"type": "WarmupCosineLR", "params": {"total_num_steps": 9, "warmup_num_steps": 3}}
        with pytest.warns(UserWarning, match=r"the checkpoint has WarmupLR, this engine WarmupCosineLR"):
            job(1, scheduler=other).load_checkpoint(tmp_path)

    def test_schedules_of_torch(self, tmp_path: Path) -> None:
        step = {"type": "MultiStepLR", "params": {"milestones": [2, 3], "gamma": 0.5}}
        saved = self.saved(tmp_path, scheduler=step)
        engine = job(0, scheduler=step)
        engine.load_checkpoint(tmp_path)
        assert engine.get_lr() == saved.get_lr() == [0.0025]

    def test_one_from_before_the_first_step_takes_states_away(self, tmp_path: Path) -> None:
        engine = job(2)
        wanted = jobs.train(job(2), 3)
        engine.save_checkpoint(tmp_path)
        jobs.train(engine, 3)
        engine.load_checkpoint(tmp_path)
        assert jobs.train(engine, 3) == wanted

    def test_saving_between_micro_batches_warns(self, tmp_path: Path) -> None:
        engine = job(2)
        tokens, wanted = jobs.micro_batches(engine, 1)[0]
        engine.backward(jobs.loss_of(engine, tokens, wanted))
        engine.step()
        with pytest.warns(
            UserWarning, match=r"after 1 of 2 micro-batches: it does not contain their gradients"
        ):
            engine.save_checkpoint(tmp_path)

    def test_an_older_tag(self, tmp_path: Path) -> None:
        engine = job(0)
        for _ in range(3):
            jobs.train(engine, 1)
            engine.save_checkpoint(tmp_path)
        other = job(0, seed=1)
        path, _ = other.load_checkpoint(tmp_path, "global_step2")
        assert path.endswith("global_step2") and other.global_steps == 2

    def test_keep_last(self, tmp_path: Path) -> None:
        engine = job(0, checkpoint={"keep_last": 2})
        for _ in range(4):
            jobs.train(engine, 1)
            engine.save_checkpoint(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step3", "global_step4", "latest"]


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 13)
        self.new = nn.Linear(2, 2)


class TestRefusals:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        engine = job(1)
        jobs.train(engine, 1)
        engine.save_checkpoint(tmp_path, client_state={"t": torch.arange(4)})
        return tmp_path

    def test_another_model(self, saved: Path) -> None:
        engine, *_ = ds_engine.initialize(model=Other(), config=jobs.config())
        with pytest.raises(
            CheckpointError,
            match=r"0 of 4 tensors of the model are in the checkpoint; 4 are missing, the first are",
        ) as caught:
            engine.load_checkpoint(saved)
        assert "unknown to the model" in str(caught.value)

    def test_more_than_the_model_has(self, saved: Path) -> None:
        model = nn.Module()
        model.inner = jobs.net().inner
        engine, *_ = ds_engine.initialize(model=model, config=jobs.config())
        with pytest.raises(
            CheckpointError, match=r"3 are unknown to the model, the first are .* or load_module_strict=False"
        ):
            engine.load_checkpoint(saved)
        engine.load_checkpoint(saved, load_module_strict=False, load_module_only=True)

    def test_another_shape(self, saved: Path) -> None:
        model = jobs.net()
        model.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        engine, *_ = ds_engine.initialize(model=model, config=jobs.config())
        with pytest.raises(CheckpointError, match=r"'scale' has shape \(8,\) in the model and \(7,\)"):
            engine.load_checkpoint(saved)

    def test_another_optimizer(self, saved: Path) -> None:
        engine = job(1, optimizer={"type": "RMSprop", "params": {"lr": 0.1}})
        with pytest.raises(CheckpointError, match=r"states are those of adam, but this engine has rmsprop"):
            engine.load_checkpoint(saved)
        engine.load_checkpoint(saved, load_optimizer_states=False)

    def test_other_groups(self, saved: Path) -> None:
        model = jobs.net()
        groups = [{"params": model.inner.parameters()}, {"params": model.embed.parameters()}]
        engine, *_ = ds_engine.initialize(model=model, config=jobs.config(), model_parameters=groups)
        with pytest.raises(
            CheckpointError, match=r"groups of \[7\] parameters, but this optimizer has groups of \[6, 1\]"
        ):
            engine.load_checkpoint(saved)

    def test_a_missing_directory(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"no checkpoint in .*nothing: there is no such directory"
        ):
            job(0).load_checkpoint(tmp_path / "nothing")

    def test_client_state_that_cannot_be_kept(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"client_state\['model'\] is a .*Net"):
            job(0).save_checkpoint(tmp_path, client_state={"model": jobs.net()})
        assert list(tmp_path.iterdir()) == []

    def test_a_flipped_bit_anywhere_in_what_is_read(self, saved: Path) -> None:
        engine = job(2)
        folder = saved / "global_step1"
        raw = (folder / "rank-00000-of-00001.safetensors").read_bytes()
        for at in range(0, len(raw), 397):
            changed = bytearray(raw)
            changed[at] ^= 0x10
            (folder / "rank-00000-of-00001.safetensors").write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"rank-00000-of-00001.safetensors.* damaged"):
                engine.load_checkpoint(saved)
        assert engine.global_steps == 0  # nothing but parameters was touched
        (folder / "rank-00000-of-00001.safetensors").write_bytes(raw)
        engine.load_checkpoint(saved)

    def test_the_remedy_names_what_else_there_is(self, saved: Path) -> None:
        engine = job(1)
        engine.load_checkpoint(saved)
        jobs.train(engine, 1)
        path = Path(engine.save_checkpoint(saved)) / "rank-00000-of-00001.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        with pytest.raises(
            CheckpointError,
            match=r"load another checkpoint with tag=\.\.\.; there are "
            "global_step1",
        ):
            engine.load_checkpoint(saved)
        engine.load_checkpoint(saved, "global_step1")


@ranks(2)
def test_damage_that_one_rank_sees_is_raised_by_all(tmp_path: Path) -> None:
    engine = job(3)
    jobs.train(engine, 1)
    path = Path(engine.save_checkpoint(tmp_path))
    if dist.get_rank() == 0:
        file = path / "rank-00001-of-00002.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1  # of the second rank's random generator, which only it reads
        file.write_bytes(raw)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"failed on 1 of 2 ranks; rank 1: .*rng/1/torch") as caught:
        engine.load_checkpoint(tmp_path)
    texts: list[Any] = [None, None]
    dist.all_gather_object(texts, str(caught.value))
    assert texts[0] == texts[1]
