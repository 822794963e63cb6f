"""The example of a plain loop: a run that was stopped continues with the same losses, also at another stage."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from docs.blocks import ROOT
from harness import ranks

EXAMPLE = ROOT / "docs" / "examples" / "plain_loop" / "train.py"


def run(folder: Path, *more: str) -> tuple[list[float], str]:
    """The script on this rank with a small model; returns the losses and all that it printed."""
    sys.argv = [str(EXAMPLE), "--dim", "32", "--batch", "8", "--checkpoints", str(folder), *more]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda: None)  # the harness's own, and more runs follow
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", out.getvalue())], out.getvalue()


@ranks(2)
def test_a_stopped_run_continues_with_the_same_losses(tmp_path):
    whole, _ = run(tmp_path / "whole", "--steps", "12")
    first, _ = run(tmp_path / "parts", "--steps", "7", "--save-every", "3")
    second, printed = run(tmp_path / "parts", "--steps", "12")
    third, _ = run(tmp_path / "parts", "--steps", "12")
    assert first + second == whole
    assert third == []
    assert (len(whole), "continuing after step 7" in printed) == (
        (12, True) if dist.get_rank() == 0 else (0, False)
    )


@ranks(2)
def test_it_continues_at_another_stage(tmp_path):
    whole, _ = run(tmp_path / "whole", "--steps", "6", "--stage", "1")
    first, _ = run(tmp_path / "parts", "--steps", "3", "--stage", "1")
    second, _ = run(tmp_path / "parts", "--steps", "6", "--stage", "3")
    assert first + second == pytest.approx(whole, abs=1e-5)
