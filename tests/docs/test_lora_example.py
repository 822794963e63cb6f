"""The LoRA example: adapters are trained, saved by all ranks together, and load into plain Transformers."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from docs.blocks import ROOT
from harness import ranks

EXAMPLE = ROOT / "docs" / "examples" / "lora" / "train.py"


def run(folder: Path, *more: str) -> str:
    """The script on this rank; returns what it printed."""
    # PEFT asks Transformers for this property by its old name, and the switch of the example has it, too.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    sys.argv = [str(EXAMPLE), "--out", str(folder), "--length", "32", "--text", str(EXAMPLE), *more]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return out.getvalue()


@ranks(2, timeout_s=300.0)
@pytest.mark.parametrize(
    "more", [[], pytest.param(["--recompute"], marks=pytest.mark.full)], ids=["kept", "recomputed"]
)
def test_adapters_are_trained_and_load(tmp_path, more):
    from peft import PeftModel

    rank = dist.get_rank()
    printed = run(tmp_path / "adapters", "--steps", "12", "--lr", "0.05", *more)
    if rank > 0:
        assert printed == ""
        return
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.2
    # What was saved is what was trained: the loss of the last steps, in plain Transformers.
    example = runpy.run_path(str(EXAMPLE))
    sys.argv = [str(EXAMPLE), "--length", "32", "--text", str(EXAMPLE)]
    base, tokens = example["load"](example["arguments"]())
    windows = tokens[: 32 * (len(tokens) // 32)].view(-1, 32)
    with torch.no_grad():
        before = base(input_ids=windows, labels=windows).loss.item()
        after = PeftModel.from_pretrained(base, tmp_path / "adapters")(
            input_ids=windows, labels=windows
        ).loss.item()
    assert before == pytest.approx(losses[0], abs=0.1)
    assert after == pytest.approx(losses[-1], abs=0.1)
