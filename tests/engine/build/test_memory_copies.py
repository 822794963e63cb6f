"""An engine keeps its newest state in the memory of hosts, each of which one rank plays."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import ds_engine
from ds_checkpoint import CheckpointError
from ds_checkpoint.memory import capacity, copies, host_folder
from engine.jobs import net
from harness import ranks


@contextmanager
def hosts(folder: Path) -> Iterator[None]:
    """Each rank is a host."""
    host = f"host-{dist.get_rank()}"
    (folder / host).mkdir()
    with (
        patch.object(socket, "gethostname", lambda: host),
        patch.object(copies, "_boot_id", lambda: host),
        patch.dict(os.environ, {host_folder.BASE: str(folder / host), host_folder.JOB: "job"}),
    ):
        yield


def engine_of(**memory: int) -> ds_engine.Engine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 2},
        "checkpoint": {"memory_copies": memory},
        "startup_summary": False,
    }
    return ds_engine.initialize(model=net(), config=config)[0]


def train(engine: ds_engine.Engine, steps: int) -> list[str]:
    losses = []
    for _ in range(steps):
        tokens = torch.full((2, 3), engine.global_steps + dist.get_rank())
        loss = engine(tokens).square().mean()
        losses.append(loss.item().hex())
        engine.backward(loss)
        engine.step()
    return losses


def generations(folder: Path) -> list[list[str]]:
    dist.barrier()
    return [sorted(path.name for path in host.glob("*/copy*")) for host in sorted(folder.glob("host-*"))]


@ranks(2)
def test_the_state_is_copied_every_few_steps_and_resumed(tmp_path: Path) -> None:
    with hosts(tmp_path):
        engine = engine_of(interval=2)
        assert engine.resume(tmp_path / "disk") is None
        seen = [generations(tmp_path) for _ in range(5) if train(engine, 1)]
        assert seen == [
            [[name], [name]] if name else [[], []]
            for name in ("", *2 * ["copy00000001"], *2 * ["copy00000002"])
        ]
        expected = train(engine, 1)
        engine.destroy()
        engine = engine_of()
        path, client_state = engine.resume(tmp_path / "disk") or ("", {})
        assert Path(path).name == "copy00000003" and (engine.global_steps, client_state) == (6, {})
        expected = train(engine, 3)
        assert generations(tmp_path) == [["copy00000003"]] * 2, "no interval: only calls make copies"
        engine.destroy()
        engine = engine_of(interval=100)
        assert engine.resume(tmp_path / "disk") is not None
        assert train(engine, 2) == expected[:2], "bitwise"
        assert Path(engine.save_copy({"epoch": 3})).name == "copy00000004"
        saved = engine.save_checkpoint(tmp_path / "disk", client_state={"epoch": 4})
        assert engine.resume(tmp_path / "disk") == (saved, {"epoch": 4})
        engine.destroy()


@ranks(2)
def test_the_number_of_copies(tmp_path: Path) -> None:
    with hosts(tmp_path):
        said = (
            pytest.warns(UserWarning, match="3 copies were asked for, and 2 hosts can keep 1")
            if dist.get_rank() == 0
            else patch("warnings.warn")
        )
        with said:
            engine = engine_of(copies=3)
        assert engine.savers.copies is not None and engine.savers.copies.ring.copies == 1
        engine.destroy()


@ranks(2)
def test_memory_that_does_not_suffice_is_refused_at_the_first_step(tmp_path: Path) -> None:
    with hosts(tmp_path):
        engine = engine_of(interval=100)
        little = patch.object(capacity, "free_bytes", lambda path: (5000, "the memory limit of the cgroup"))
        with little if dist.get_rank() == 1 else patch("os.getpid"):
            with pytest.raises(CheckpointError) as raised:
                train(engine, 1)
        text = str(raised.value)
        assert "failed on 1 of 2 ranks; rank 1: host-1 has too little memory for copies" in text
        own, copied = (int(part.split()[0]) for part in text.partition("2 x (")[2].split(" + ")[:2])
        assert f"{2 * (own + copied)} bytes are needed" in text and own > 1000 and copied > 1000
        assert "the memory limit of the cgroup leaves 5000" in text and "DS_MEMORY_FOLDER" in text
        engine.destroy()


@ranks(2)
def test_training_goes_on_if_memory_is_full_later(tmp_path: Path) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with hosts(tmp_path):
        engine = engine_of(interval=1)
        train(engine, 1)
        rank = dist.get_rank()
        said = (
            pytest.warns(
                UserWarning, match="step 2 was not copied into memory: .* rank 1: OSError: .*No space"
            )
            if rank == 0
            else patch("os.getpid")
        )
        with said, patch("os.posix_fallocate", full) if rank == 1 else patch("os.getpid"):
            train(engine, 1)
        assert generations(tmp_path) == [["copy00000001"]] * 2, (
            "the old one is there, and nothing half written"
        )
        train(engine, 1)
        assert generations(tmp_path) == [["copy00000002"]] * 2
        engine.destroy()


@ranks(1)
def test_without_the_section_there_are_no_copies() -> None:
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW"}, "startup_summary": False}
    engine, *_ = ds_engine.initialize(model=net(), config=config)
    with pytest.raises(ValueError, match="memory_copies"):
        engine.save_copy()
