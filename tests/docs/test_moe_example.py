"""The example of a mixture of experts: the same losses on 1 and on 4 ranks, and from a checkpoint of another size."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from docs.blocks import ROOT
from harness import ranks

EXAMPLE = ROOT / "docs" / "examples" / "moe" / "train.py"
SMALL = ("--dim", "32", "--depth", "2", "--length", "32", "--batch", "8")


def losses_of(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """Losses in one process."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *SMALL, "--steps", "40"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return losses_of(done.stdout)


def run(*more: str) -> str:
    sys.argv = [str(EXAMPLE), *SMALL, *more]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda *_: None)  # the harness's own
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return out.getvalue()


@ranks(4, groups_may_stay=True, timeout_s=120)
def test_it_has_the_losses_of_one_process_also_from_a_checkpoint(alone, tmp_path: Path):
    folder = str(tmp_path / "saved")
    first = run("--steps", "20", "--ep", "2", "--stage", "3", "--save", folder)
    second = run("--steps", "20", "--ep", "4", "--stage", "1", "--load", folder)
    if dist.get_rank() == 0:
        assert losses_of(first + second) == pytest.approx(alone, abs=2e-3)
        assert alone[-1] < alone[0] < 6
        assert "0.0% dropped" in second and " 0.0 MB sent" not in second
