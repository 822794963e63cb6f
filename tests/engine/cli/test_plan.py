"""`ds plan`: a configuration and a factory in, a table out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_engine.build.plan import load_factory
from ds_engine.cli.main import app
from ds_engine.cli.sizes import parse_bytes

FACTORY = """
import torch
from torch import nn

def only():
    return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))

def both():
    model = only()
    assert all(p.is_meta for p in model.parameters())
    return model, torch.empty(3, 512)

def wrong():
    return 5
"""
NUMEL = 2 * (512 * 512 + 512)


def ds_plan(folder: Path, *arguments: str, factory: str = "both", **config: object) -> tuple[int, str]:
    (folder / "job.py").write_text(FACTORY)
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    } | config
    (folder / "ds.json").write_text(json.dumps(settings))
    where = [
        "--config",
        str(folder / "ds.json"),
        "--model",
        f"{folder / 'job.py'}:{factory}",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, ["plan", *where, *arguments])
    return result.exit_code, result.output


def test_the_table_names_the_job_and_its_peak(tmp_path: Path) -> None:
    code, text = ds_plan(tmp_path, "--ranks", "4", zero_optimization={"stage": 3})
    assert code == 0 and "stage 3" in text and "4 ranks" in text and "forward" in text and "peak" in text


def test_states_follow_the_formula_and_the_configuration(tmp_path: Path) -> None:
    def states(ranks: int, stage: int) -> int:
        code, text = ds_plan(tmp_path, "--ranks", str(ranks), "--json", zero_optimization={"stage": stage})
        found = json.loads(text)
        assert code == 0 and found["ranks"] == ranks and found["stage"] == stage
        assert found["optimizer"] == "FusedAdam"
        rest = next(phase for phase in found["phases"] if phase["phase"] == "step")
        return int(rest["parts"]["states"])

    whole = states(1, 1)
    assert 8 * NUMEL <= whole <= 8.1 * NUMEL
    assert states(4, 1) == pytest.approx(whole / 4, rel=0.05) and states(4, 0) == pytest.approx(
        whole, rel=0.01
    )


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    code, text = ds_plan(tmp_path, "--ranks", "4", "--budget", "7MB", zero_optimization={"stage": 0})
    assert code == 1 and "does not fit in" in text and "nearest settings that fit" in text
    code, text = ds_plan(tmp_path, "--budget", "1GB", factory="only")
    assert code == 0 and "fits in" in text


@pytest.mark.parametrize(
    ("factory", "message"),
    [("wrong", "returned a int"), ("gone", "has no function gone"), ("", "write package.module")],
)
def test_mistakes_are_one_line(tmp_path: Path, factory: str, message: str) -> None:
    code, text = ds_plan(tmp_path, factory=factory)
    assert code == 2 and message in text and "Traceback" not in text


def test_sizes_and_modules() -> None:
    assert (
        parse_bytes("24GiB") == 24 * 2**30
        and parse_bytes("1.5 gb") == 15 * 10**8
        and parse_bytes("1e6") == 10**6
    )
    for text in ("24 apples", "GB", ""):
        with pytest.raises(ValueError, match="no size"):
            parse_bytes(text)
    assert load_factory("json:loads")("1") == 1
    with pytest.raises(ValueError, match="no module nowhere"):
        load_factory("nowhere:f")
