"""The table at the start says what was chosen, why, and what a rank holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

import ds_zero
from ds_engine.training import startup_summary
from engine import jobs


@pytest.fixture(autouse=True)
def _no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def table(**more: Any) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for setting, choice, why in startup_summary.rows(jobs.engine(**more)):
        found[setting or why] = (choice, why)
    return found


def test_choices_and_reasons() -> None:
    rows = table(stage=3, bf16={"enabled": True}, gradient_clipping=0.5)
    assert rows["ZeRO stage"] == ("3: optimizer states, gradients and parameters are divided", "as set")
    assert rows["precision"] == ("bf16, with fp32 masters; gradients summed in fp32", "as set by bf16")
    assert rows["batch"][0] == "16 = 8 a rank x 2 x 1 ranks"
    assert rows["accumulation"] == ("2 micro-batches, sharded plan", "default of stage 3")
    assert rows["clipping"] == ("norm 0.5", "as set")
    assert rows["optimizer"][0] == "FusedAdam (ds_core), lr 0.01"
    assert rows["schedule"] == ("WarmupLR", "as set")


def test_variables_of_a_scheduler_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = table()["ranks"][1]
    assert started == "started by mpi (OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE)"


def test_sections_that_are_off_decide_nothing() -> None:
    off = {"fp16": {"enabled": False}, "bf16": {"enabled": False}}
    assert table(**off)["precision"][1] == "default"
    assert table(bf16={"enabled": False})["precision"][1] == "default"
    on = {"fp16": {"enabled": False}, "bf16": {"enabled": True}}
    assert table(**on)["precision"][1] == "as set by bf16"


def test_dtypes_of_what_is_held_are_told() -> None:
    more = {
        "bf16": {"enabled": True, "bf16_optimizer_states": True},
        "data_types": {"grad_accum_dtype": "fp16"},
    }
    engine = jobs.engine(0, **more)
    rows = {why: choice for _, choice, why in startup_summary.rows(engine)}
    numel, owned = (
        ds_zero.describe(engine.module).trainable_numel,
        ds_zero.describe(engine.module).owned_numel,
    )
    assert rows["reduced gradients, fp16"] == startup_summary.human(2 * owned)
    assert rows["whole gradients during accumulation, fp16"] == startup_summary.human(2 * numel)
    (states,) = [
        choice for why, choice in rows.items() if why.startswith("optimizer states") and "bf16" in why
    ]
    assert states == startup_summary.human(4 * owned)
    fp16 = table(fp16={"enabled": True, "loss_scale": 128})
    assert fp16["precision"] == (
        "fp16, with fp32 masters; gradients summed in fp32; loss scale 128",
        "as set by fp16",
    )


def test_defaults_are_named_as_such() -> None:
    rows = table(scheduler=None)
    assert rows["clipping"] == ("norm 1", "default; 0 turns it off")
    assert rows["precision"][1] == "default"
    assert rows["schedule"] == ("constant rate", "default")


def test_what_changes_nothing_is_said_in_one_line() -> None:
    rows = table(
        zero_optimization={"stage": 1, "contiguous_gradients": True, "stage3_prefetch": True},
        aio={"block_size": 4096},
        gradient_clipping="auto",
    )
    assert rows["without effect"][0] == "contiguous_gradients, stage3_prefetch, block_size"
    assert rows['"auto"'] == ("gradient_clipping", "not replaced by an integration: default")
    assert "without effect" not in table()


def test_states_are_predicted_before_they_exist() -> None:
    engine = jobs.engine(1)
    rows = [choice for _, choice, why in startup_summary.rows(engine) if "optimizer states for" in why]
    jobs.train(engine, 1)
    held = sum(t.numel() * 4 for state in engine.optimizer.state.values() for t in state.values() if t.ndim)
    padded = 8 * ds_zero.describe(engine.module).owned_numel
    # Padding is less than a cache line for each of the 7 trained parameters and their bucket.
    assert rows == [startup_summary.human(padded)] and held <= padded <= held + 8 * 8 * 32


def test_it_is_printed_once_and_can_be_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    jobs.engine(startup_summary=True)
    out, err = capfd.readouterr()
    assert out == "" and "ZeRO stage" in err and "a rank holds" in err
    jobs.engine(startup_summary=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_300_000, "12.3 MB"), (5e12, "5.0 TB")],
)
def test_units(num_bytes: float, text: str) -> None:
    assert startup_summary.human(num_bytes) == text
