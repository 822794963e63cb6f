"""The example of a pipeline: the same losses in one process, on 2 and on 4 stages, with every kind of schedule."""

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

EXAMPLE = ROOT / "docs" / "examples" / "pipeline" / "train.py"
SMALL = ("--dim", "32", "--depth", "8", "--length", "32", "--steps", "20", "--micro-batches", "8")


def losses_of(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """Losses in one process."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *SMALL], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return losses_of(done.stdout)


def run(*more: str) -> list[float]:
    sys.argv = [str(EXAMPLE), *SMALL, *more]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda *_: None)  # the harness's own
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return losses_of(out.getvalue())


@ranks(2, 4, groups_may_stay=True)
@pytest.mark.parametrize(
    "schedule, more",
    [
        ("1f1b", ()),
        ("zb-v", ()),
        *(
            pytest.param(s, m, marks=pytest.mark.full)
            for s in ("gpipe", "interleaved", "zb-h1", "zb-h2", "dualpipev")
            for m in ((), ("--recompute",))
        ),
    ],
)
def test_it_has_the_losses_of_one_process(alone, schedule, more):
    ours = run("--schedule", schedule, *more)
    if dist.get_rank() == 0:
        assert ours == pytest.approx(alone, abs=2e-4)
        assert ours[-1] < ours[0] < 6


@ranks(4, groups_may_stay=True)
def test_with_data_parallel_ranks_it_draws_its_timeline(tmp_path: Path):
    page = tmp_path / "timeline.html"
    losses = run("--stages", "2", "--timeline", str(page))
    if dist.get_rank() == 0:
        assert losses[-1] < losses[0]
        assert page.read_text().count("<g><title>") == 2 * 8 * 2
