"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_engine
from ds_checkpoint import CheckpointError, open_checkpoint
from ds_checkpoint.disk import buffers, outfile
from ds_checkpoint.format import folder
from ds_checkpoint.write import background, write
from engine.jobs import config, net
from harness import ranks


def job(**more: Any) -> ds_engine.Engine:
    settings = config(2, startup_summary=False, checkpoint={"writer": {"decoupled": True}} | more)
    engine, *_ = ds_engine.initialize(model=net(), config=settings)
    return engine


def step(engine: ds_engine.Engine) -> None:
    for _ in range(2):
        tokens = torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(engine.micro_steps))
        engine.backward(engine(tokens).square().mean())
        engine.step()


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits for this event; two threads take the copy, however small it is."""
    go = threading.Event()
    monkeypatch.setattr(background, "HELPED_BYTES", 0)

    def slow(*args: Any, **kwargs: Any) -> str:
        assert go.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(background, "write", slow)
    return go


@ranks(1, 2)
def test_what_is_written_is_the_state_of_the_call_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with job() as engine, job() as other:
        step(engine)
        other.savers.background = None
        other.save_checkpoint(tmp_path / "plain")  # before any step
        step(other)
        other.save_checkpoint(tmp_path / "plain")
        go = held_back(monkeypatch)
        path = engine.save_checkpoint(tmp_path / "c", client_state={"n": 1})
        assert not Path(path).exists()
        step(engine)  # collectives of both threads at once
        go.set()
        engine.wait_for_checkpoint()
        with open_checkpoint(path) as ours, open_checkpoint(tmp_path / "plain") as plain:
            assert ours.manifest.values["client_state"] == {"n": 1}
            assert ours.manifest.tensors.keys() == plain.manifest.tensors.keys()
            for fqn, states in plain.manifest.tensors.items():
                for state in states:
                    assert torch.equal(ours.tensor(fqn, state), plain.tensor(fqn, state)), (fqn, state)


@ranks(2)
def test_one_copy_at_a_time_in_the_same_buffers_and_pruned(tmp_path: Path) -> None:
    with job(keep_last=2) as engine:
        saver = engine.savers.background
        assert saver is not None
        step(engine)
        engine.save_checkpoint(tmp_path)
        assert saver._image is not None
        place = saver._image.content.data_ptr()
        for _ in range(3):
            step(engine)
            engine.save_checkpoint(tmp_path)  # waits for the one before
        assert place == saver._image.content.data_ptr()
        engine.wait_for_checkpoint()
        assert sorted(folder.complete(tmp_path)) == ["global_step3", "global_step4"]
        step(engine)
        engine.save_checkpoint(tmp_path, tag="last")
        engine.load_checkpoint(tmp_path)  # waits, too
        assert engine.global_steps == 5
    assert (tmp_path / "latest").read_text() == "last"


@ranks(2)
def test_a_failure_is_told_and_training_goes_on_with_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with job() as engine:
        saver = engine.savers.background
        assert saver is not None
        saver._say = said.append
        step(engine)
        engine.save_checkpoint(tmp_path)
        engine.wait_for_checkpoint()

        def full(*args: Any, **kwargs: Any) -> str:
            raise CheckpointError("no space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(background, "write", full)
            step(engine)
            engine.save_checkpoint(tmp_path)
            with pytest.raises(CheckpointError, match="no space left"):
                engine.wait_for_checkpoint()
            engine.wait_for_checkpoint()  # told once
            engine.save_checkpoint(tmp_path)
            saver._thread.join()  # type: ignore[union-attr]
        assert len(said) == (2 if engine.world.rank == 0 else 0)
        step(engine)
        with pytest.warns(UserWarning, match="the previous checkpoint was not written"):
            engine.save_checkpoint(tmp_path)
        engine.wait_for_checkpoint()
        assert sorted(folder.complete(tmp_path)) == ["global_step1", "global_step3"]


def held_late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Every tensor that may be is copied late, and not before this event."""
    go = threading.Event()
    run = background._LateCopy.run

    def slow(self: Any) -> None:
        assert go.wait(30)
        run(self)

    monkeypatch.setattr(background, "LATE_BYTES", 0)
    monkeypatch.setattr(background._LateCopy, "run", slow)
    return go


def decoupled(stage: int, more: dict[str, Any]) -> ds_engine.Engine:
    settings = config(stage, checkpoint={"writer": {"decoupled": True}}, **more)
    engine, *_ = ds_engine.initialize(model=net(), config=settings)
    return engine


@ranks(1, 2)
@pytest.mark.parametrize("more", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_next_step_waits_for_what_is_copied_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, more: dict[str, Any]
) -> None:
    with decoupled(stage, more) as plain:
        plain.savers.background = None
        step(plain)
        step(plain)
        plain.save_checkpoint(tmp_path / "plain")
    with decoupled(stage, more) as engine:
        step(engine)
        engine.save_checkpoint(tmp_path / "first")  # buffers exist from here on, with the values of this step
        step(engine)
        go = held_late(monkeypatch)
        if stage == 3:  # as a large file: past the page cache, from where the copy lies
            monkeypatch.setattr(outfile, "LARGE_BYTES", 1)
            monkeypatch.setattr(buffers, "BUFFER_BYTES", 4096)
        path = engine.save_checkpoint(tmp_path / "late")
        assert engine.savers.background is not None and engine.savers.background._late is not None
        timer = threading.Timer(0.2, go.set)
        timer.start()
        step(engine)
        assert go.is_set(), "the step did not wait"
        timer.join()
        engine.wait_for_checkpoint()
        with open_checkpoint(path) as ours, open_checkpoint(tmp_path / "plain") as wanted:
            for fqn, states in wanted.manifest.tensors.items():
                for state in states:
                    assert torch.equal(ours.tensor(fqn, state), wanted.tensor(fqn, state)), (fqn, state)


@ranks(2)
def test_a_state_that_is_changed_by_hand_meanwhile_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with job() as engine:
        step(engine)
        go = held_late(monkeypatch)
        assert engine.savers.background is not None
        engine.savers.background._say = lambda text: None
        engine.save_checkpoint(tmp_path)
        if engine.world.rank == 0:
            for states in engine.optimizer.state.values():
                states["exp_avg"].mul_(0.5)
        go.set()
        with pytest.raises(CheckpointError, match=r"rank 0: exp_avg of .* was changed before it was copied"):
            engine.wait_for_checkpoint()
        step(engine)
        engine.save_checkpoint(tmp_path)
        engine.wait_for_checkpoint()
        assert list(folder.complete(tmp_path)) == ["global_step2"]
