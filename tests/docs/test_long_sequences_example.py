"""The example of long sequences: the same losses on one rank, with Ulysses, and in a ring."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import subprocess
import sys

import pytest
import torch.distributed as dist

from docs.blocks import ROOT
from harness import ranks

EXAMPLE = ROOT / "docs" / "examples" / "long_sequences" / "train.py"
SMALL = ("--steps", "10", "--length", "64", "--dim", "16")


def losses_of(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *SMALL], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return losses_of(done.stdout)


@ranks(2, groups_may_stay=True)
def test_it_has_the_losses_of_one_rank(alone):
    for more in ((), ("--ring", "2", "--stage", "2")):
        sys.argv = [str(EXAMPLE), *SMALL, *more]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "destroy_process_group", lambda *_: None)  # the harness's own
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        if dist.get_rank() == 0:
            assert losses_of(out.getvalue()) == pytest.approx(alone, abs=2e-4)
