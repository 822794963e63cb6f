"""The example of slow networks: every way of training learns."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys

import pytest
import torch.distributed as dist

from docs.blocks import ROOT
from harness import ranks

EXAMPLE = ROOT / "docs" / "examples" / "slow_network" / "train.py"


@ranks(2, groups_may_stay=True)
@pytest.mark.parametrize("how", ["onebit", "zeroone", "fsdp2", "ddp", "plain"])
def test_it_learns(how: str) -> None:
    sys.argv = [str(EXAMPLE), "--how", how, "--steps", "60", "--freeze-step", "20", "--dim", "64"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda: None)  # the harness's own
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    if dist.get_rank() == 0:
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out.getvalue())]
        assert len(losses) == 3
        assert losses[-1] < 5.0  # ln 256 = 5.5 at the beginning
    if how == "onebit" and dist.get_rank() == 0:
        sent, compressed = (int(n) for n in re.findall(r"(\d+) (?:bytes|of)", out.getvalue()))
        assert sent > 20 * 20 * compressed  # 20 steps at full precision, of 32 times the bytes
