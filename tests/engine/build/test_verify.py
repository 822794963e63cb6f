"""`ds verify`: the engine under a configuration against plain PyTorch, by its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import ds_zero
from ds_engine.build.verify import verify
from ds_engine.cli.main import app
from ds_engine.config import load
from engine.jobs import Net, config, loss_of
from engine.launching import clean_environ
from harness import ranks

FACTORY = """
import os
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8)), torch.empty(2, 8)

def faulty():
    made, inputs = model()
    if os.environ.get("RANK", "1") == "1":
        made[3].weight.register_hook(lambda grad: 2 * grad)
    return made, inputs

def alone():
    return nn.Linear(3, 1)

def rows():
    return [torch.full((2, 3), float(i)) for i in range(4)]

def loss(model, batch):
    return model(batch).square().mean()

def wrong():
    return 5

def broken():
    raise KeyError("mine")
"""


def arguments(folder: Path, factory: str, *more: str, **settings: Any) -> list[str]:
    (folder / "job.py").write_text(FACTORY)
    (folder / "ds.json").write_text(json.dumps(config(2, **settings)))
    return [
        "verify",
        "--config",
        str(folder / "ds.json"),
        "--model",
        f"{folder / 'job.py'}:{factory}",
        *more,
    ]


def ds_verify(folder: Path, factory: str, *more: str, **settings: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments(folder, factory, "--ranks", "1", *more, **settings))
    return result.exit_code, result.output


def data(made: Any, batch: Any) -> Tensor:
    return loss_of(made, *batch)


def micro_batches(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 11, (4,), generator=generator), torch.randint(0, 11, (4,), generator=generator)


MORE: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1, "bf16": {"enabled": True}, "optimizer": {"type": "Lamb", "params": {"lr": 0.01}}},
    {"stage": 2, "offload": True, "gradient_clipping": 0.1},
    {"stage": 2, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    {"stage": 3, "fp16": {"enabled": True, "initial_scale_power": 6}, "gradient_clipping": 0.1},
    {"stage": 3, "bf16": {"enabled": True}, "prescale_gradients": True, "communication_data_type": "fp32"},
    {"stage": 3, "optimizer": {"type": "Muon", "params": {"lr": 0.01}}},
]


_ADAM: dict[str, Any] = {"type": "AdamW", "params": {"lr": 0.01}}


def _adam(**formats: Any) -> dict[str, Any]:
    return {"optimizer": {**_ADAM, "params": {**_ADAM["params"], **formats}}, "bf16": {"enabled": True}}


OFFLOADED: list[dict[str, Any]] = [
    {"stage": 2, "device": "cpu", "gradient_clipping": 0.1, **_adam(split_masters=True)},
    {"stage": 3, "device": "nvme", **_adam(split_masters=True, state_dtype="bf16")},
    {"stage": 2, "device": "nvme", **_adam(state_dtype="int8")},
    {"stage": 3, "device": "cpu", "overlap_step": True, **_adam(state_dtype="bf16")},
    {"stage": 3, "device": "nvme", "overlap_step": True, **_adam(split_masters=True)},
]


@ranks(2)
def test_formats_and_places_of_states_are_exact(tmp_path: Path) -> None:
    for row in OFFLOADED:
        row = dict(row)
        names = ("device", "overlap_step")
        place = {name: row.pop(name) for name in names if name in row} | {"nvme_path": str(tmp_path)}
        zero = {"stage": row.pop("stage"), "offload_optimizer": place}
        settings = load(config(**{"zero_optimization": zero, **row}))
        found = verify(settings, Net, micro_batches, data, steps=3, bitwise=True)
        assert found.exact, f"{place}, {row}: {found}"


@ranks(2)
def test_the_engine_is_exact() -> None:
    for row in MORE:
        row = dict(row)
        zero: dict[str, Any] = {"stage": row.pop("stage")}
        if row.pop("offload", False):
            zero["offload_optimizer"] = {"device": "cpu"}
        found = verify(
            load(config(**{"zero_optimization": zero, **row})),
            Net,
            micro_batches,
            data,
            steps=3,
            bitwise=True,
        )
        assert found.ok and found.exact, f"{row}: {found}"
        assert found.losses == found.plain_losses and len(set(found.losses)) == 3


def lossy() -> Net:
    made = Net()
    if dist.get_rank() == 1:
        made.inner[0].weight.register_hook(lambda grad: 1.01 * grad)
    return made


@ranks(2)
def test_a_fault_is_found_under_the_engine() -> None:
    found = verify(load(config(2)), lossy, micro_batches, data, steps=2)
    first = found.first_beyond
    assert not found.ok and first is not None
    assert (first.step, first.kind, first.name) == (1, "gradient", "inner.0.weight"), str(found)
    assert first.module == "inner.0 (Linear)"


def test_a_data_set_and_a_given_optimizer() -> None:
    settings = load(config(2, optimizer=None, scheduler=None))

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))

    samples = TensorDataset(torch.arange(64.0).view(16, 4))
    found = verify(
        settings, build, samples, optimizer=lambda params: torch.optim.SGD(params, lr=1e-4), steps=2
    )
    assert found.exact and found.steps == 2 and found.losses[0] != found.losses[1]
    assert isinstance(found, ds_zero.Verification)


def test_exit_codes_on_one_rank(tmp_path: Path) -> None:
    code, text = ds_verify(tmp_path, "model", "--steps", "2")
    assert code == 0 and "EXACT: 2 steps" in text and "draws random numbers" in text
    code, text = ds_verify(tmp_path, "model", "--json", "--bitwise")
    assert code == 0 and json.loads(text)["exact"] is True
    where = f"{tmp_path / 'job.py'}"
    code, text = ds_verify(tmp_path, "alone", "--batches", f"{where}:rows", "--loss", f"{where}:loss")
    assert code == 0 and "EXACT" in text


@pytest.mark.parametrize(
    ("factory", "more", "message"),
    [
        ("wrong", [], "returned a int"),
        ("gone", [], "has no function gone"),
        ("alone", [], "there are no micro-batches"),
        ("broken", [], "KeyError: 'mine'"),
    ],
)
def test_what_cannot_be_judged_is_2(tmp_path: Path, factory: str, more: list[str], message: str) -> None:
    code, text = ds_verify(tmp_path, factory, *more)
    assert code == 2 and message in text


def test_a_broken_configuration_is_2(tmp_path: Path) -> None:
    code, text = ds_verify(tmp_path, "model", optimiser={"type": "AdamW"})
    assert code == 2 and "optimiser" in text and "Traceback" not in text


def test_two_ranks_are_started_and_a_fault_is_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ds_engine", *arguments(tmp_path, "faulty", "--ranks", "2")]
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DEVIATES in step 1: gradient of 3.weight, module 3 (Linear)" in done.stdout
    assert done.stderr == "", "the launcher has nothing to say where the answer is known"


@pytest.mark.full
def test_inside_a_launcher(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ds_engine", "run", "--nproc", "2", "--module", "ds_engine"]
    command += arguments(tmp_path, "model", "--json")
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ranks"] == 2, "rank 0 alone speaks"
    assert "RANK" not in os.environ
