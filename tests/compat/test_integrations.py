"""Accelerate and Transformers, unchanged, on two processes: the jobs in `jobs/` as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

JOBS = Path(__file__).parent / "jobs"


def start(job: str, folder: Path, **options: Any) -> dict[str, Any]:
    """What a job of two processes writes."""
    out = folder / f"{job}-{len(list(folder.iterdir()))}.json"
    command = [
        sys.executable,
        "-m",
        "ds_engine",
        "run",
        "--nproc=2",
        str(JOBS / f"{job}.py"),
        f"--out={out}",
        *as_words(options),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def as_words(options: dict[str, Any]) -> list[str]:
    return [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in options.items()
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def start_several(job: str, folder: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `start` for each case, with one start of Python for all of them."""
    outs = [folder / f"{job}-{number}.json" for number in range(len(cases))]
    listed = [{"options": as_words(case), "out": str(out)} for case, out in zip(cases, outs, strict=True)]
    (folder / "cases.json").write_text(json.dumps(listed))
    command = [sys.executable, str(JOBS / "several.py"), job, str(folder / "cases.json"), "2", "300"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=environment(), check=False
    )
    logs = "".join(file.read_text() for file in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return [json.loads(out.read_text()) for out in outs]


def reference(steps: int, accumulation: int, decay: float) -> list[float]:
    """Losses of the first of two ranks, by plain PyTorch in one process."""
    sys.path.insert(0, str(JOBS))
    try:
        import common
    finally:
        sys.path.remove(str(JOBS))
    model = common.model("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    data = common.samples(2 * 2 * accumulation * steps)
    losses = []
    for step in range(steps):
        for number in range(accumulation):
            for rank in range(2):
                first = 2 * (2 * (step * accumulation + number) + rank)
                batch = {key: torch.stack([s[key] for s in data[first : first + 2]]) for key in data[0]}
                loss = model(**batch).loss
                (loss / accumulation / 2).backward()
                if rank == 0:
                    losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # Accelerate moves a schedule once for each process.
        optimizer.param_groups[0]["lr"] = 1e-3 / (1 + decay * 2 * (step + 1))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "accumulation"),
    [
        pytest.param(stage, accumulation, marks=() if (stage, accumulation) == (3, 2) else pytest.mark.full)
        for stage in (0, 1, 2, 3)
        for accumulation in (1, 2)
    ],
)
def test_accelerate(stage: int, accumulation: int, tmp_path: Path) -> None:
    """Saves and loads its state in the middle, which changes nothing."""
    found = start(
        "accelerated", tmp_path, stage=stage, accumulation=accumulation, steps=4, state=tmp_path / "state"
    )
    assert found["losses"] == pytest.approx(reference(4, accumulation, 0.01), rel=1e-5)
    assert (stage == 3) or "lm_head.weight" in found["names"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [3, pytest.param(0, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)]
)
def test_trainer_loads_trains_saves_and_resumes(stage: int, tmp_path: Path) -> None:
    sys.path.insert(0, str(JOBS))
    try:
        import common
    finally:
        sys.path.remove(str(JOBS))
    common.model("gpt2").save_pretrained(tmp_path / "tiny")
    whole = start(
        "trainer", tmp_path, stage=stage, steps=4, accumulation=2, save_at=2, pretrained=tmp_path / "tiny"
    )
    assert len(whole["losses"]) == 4 and all(norm > 0 for norm in whole["norms"])
    saved = next(tmp_path.glob("trainer-*/checkpoint-2"))
    assert (saved / "latest").read_text() == "global_step2"  # what Transformers looks for
    # Not from the files: the weights are those of the checkpoint.
    rest = start("trainer", tmp_path, stage=stage, steps=4, accumulation=2, resume=saved)
    assert rest["losses"] == pytest.approx(whole["losses"][2:], abs=2e-4)  # the log has four digits
    assert rest["eval"] == pytest.approx(whole["eval"], rel=1e-5)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_all_stages_agree_in_the_plain_script(model: str, accumulation: int, tmp_path: Path) -> None:
    options = {"model": model, "accumulation": accumulation, "steps": 4}
    found = start_several("plain", tmp_path, [{**options, "stage": stage} for stage in (0, 1, 2, 3)])
    for other in found[1:]:
        assert other["losses"] == pytest.approx(found[0]["losses"], rel=1e-5)
        assert len(other["losses"]) == 4 * accumulation


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["config", "trainer"])
def test_all_stages_agree_in_the_trainer(optimizer: str, tmp_path: Path) -> None:
    cases = [{"stage": stage, "steps": 3, "optimizer": optimizer} for stage in (0, 1, 2, 3)]
    found = start_several("trainer", tmp_path, cases)
    for other in found[1:]:
        assert other["micro_losses"] == pytest.approx(found[0]["micro_losses"], rel=1e-5)
        assert other["eval"] == pytest.approx(found[0]["eval"], rel=1e-5)


@pytest.mark.full
@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage=2"]
    command += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command += [str(JOBS / "accelerated.py"), "--stage=2", "--steps=3", f"--out={out}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text())["losses"] == pytest.approx(reference(3, 1, 0.01), rel=1e-5)
