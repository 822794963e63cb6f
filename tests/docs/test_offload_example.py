"""The example whose state is larger than the memory that it may use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from docs.blocks import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "offload" / "larger_than_memory.py"

# Without instructions for bf16, a step of the example takes seconds in it.
DTYPE = "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=env)


def losses(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return re.findall(r"loss (\S+)", done.stdout)


def test_a_model_three_times_as_large_as_its_memory_trains(tmp_path: Path) -> None:
    done = run("--nvme-path", str(tmp_path), "--steps", "2", "--dtype", DTYPE)
    assert len(losses(done)) == 2
    assert re.search(r"in memory: peak .* a rank: does not fit in 256.0 MiB", done.stdout)
    assert re.search(r"on a disk: peak .* on a disk: fits in 256.0 MiB", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.full), 2])
def test_states_on_a_disk_in_a_plain_loop(ranks: int, tmp_path: Path) -> None:
    script = str(EXAMPLE.with_name("plain_loop.py"))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*(start if ranks == 2 else [sys.executable]), script, "--folder", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    found = [float(loss) for loss in losses(done)]
    assert len(found) == 20 and found[-1] < 0.8 * found[0]
    assert "states on the disk" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.full
def test_it_has_the_losses_of_training_in_memory_and_does_not_fit_there(tmp_path: Path) -> None:
    on_disk = losses(run("--nvme-path", str(tmp_path), "--steps", "20"))
    assert len(on_disk) == 20
    assert losses(run("--offload", "cpu", "--limit-mib", "0", "--steps", "20")) == on_disk
    failed = run("--offload", "cpu", "--steps", "20")
    assert failed.returncode != 0
    assert "rank 0 needs 864 MiB for training state in host memory, but RLIMIT_DATA" in failed.stderr
