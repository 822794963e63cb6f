"""`ds plan` of a pipeline: predicted bytes of every rank beside those that its training allocates."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import ds_engine
from ds_engine.build.memory.pipeline_plan import in_flight_of, plan_pipeline
from ds_engine.build.memory.plan_table import Options
from ds_engine.cli.main import app
from ds_engine.config import load
from ds_pipe import make
from ds_zero.predict.measured_memory import counted_memory
from engine.jobs import on_ranks
from engine.pipeline import planned_model
from engine.pipeline.planned_model import ROWS, TOKENS, VOCABULARY, WIDTH, config, micro_batch, pipeline

RATES = {
    "flops_per_s": 1e10,
    "memory_bytes_per_s": 1e10,
    "link": {"latency_s": 1e-5, "bytes_per_s": 1e9},
    "price_per_rank_hour": 2.0,
}

# (schedule, ZeRO stage, tied weights, micro-batches)
CASES = [("1f1b", 1, False, 4), ("zb-v", 2, False, 4), ("1f1b", 3, True, 4)]


@pytest.fixture(autouse=True)
def _no_process_group():
    """Planning takes the place of every pipeline rank; tests that ran before may have left a group of one rank."""
    if dist.is_initialized():
        dist.destroy_process_group()


def counted(cases) -> None:
    """Trains every case on two pipeline ranks x two copies, and writes the peaks of all ranks."""
    torch.manual_seed(0)
    found = []
    for schedule, stage, tied, count in cases:
        data = [
            (torch.randint(VOCABULARY, (ROWS, TOKENS)), torch.randint(VOCABULARY, (ROWS, TOKENS)))
        ] * count
        with counted_memory() as memory:
            engine, *_ = ds_engine.initialize(pipeline(schedule, tied=tied), config(stage, count))
            for _ in range(2):
                engine.train_batch(data)
        engine.destroy()
        peaks = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, memory.peak_bytes)
        found.append([max(peaks[:2]), max(peaks[2:])])
    if dist.get_rank() == 0:
        print("COUNTED", json.dumps(found))


def planned(schedule, tied):
    return pipeline(schedule, tied=tied), micro_batch()


def test_the_plan_is_what_is_counted(request, capsys):
    on_ranks(request, 4, counted, groups_may_stay=True, cases=CASES)
    line = next(line for line in capsys.readouterr().out.splitlines() if "COUNTED" in line)
    for (schedule, stage, tied, count), peaks in zip(
        CASES, json.loads(line.split("COUNTED ")[1]), strict=True
    ):
        factory = partial(planned, schedule, tied)
        made = plan_pipeline(load(config(stage, count)), factory, 4, Options(device="cpu"))
        for rank, (plan, peak) in enumerate(zip(made.plans, peaks, strict=True)):
            # Never less than what is needed; a rank of a V has another moment of most memory than of most activations,
            # and how many messages are under way depends on how fast the other ranks are.
            assert 1.0 <= plan.device_bytes / peak <= 1.2, (schedule, stage, rank, plan.device_bytes, peak)


def test_the_command(tmp_path):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(config(2, 8)))
    arguments = [
        "plan",
        "--config",
        str(file),
        "--model",
        f"{planned_model.__file__}:piped",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, [*arguments, "--ranks", "4", "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["in_flight"] == [{"0": 2}, {"1": 1}] and made["bubble"] == pytest.approx(1 / 9)
    assert made["ranks"][0]["ranks"] == 2 and made["device_bytes"] == made["ranks"][0]["device_bytes"]
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    html = tmp_path / "plan.html"
    timed = ["--rates", str(tmp_path / "rates.json"), "--steps", "10", "--html", str(html)]
    result = CliRunner().invoke(app, [*arguments, "--ranks", "4", "--json", *timed])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    pipe, data = made["time"]["axes"]
    assert pipe["sent_bytes"] == 8 * ROWS * TOKENS * WIDTH * 4 and data["ranks"] == 2
    time = made["time"]
    assert (
        time["compute_s"]
        < time["total_s"]
        == pytest.approx(time["compute_s"] + time["exposed_s"] + time["update_s"])
    )
    assert made["bubble"] > 1 / 9  # the last stage has the head, so the first one waits for it
    assert made["cost"]["run"] == pytest.approx(10 * made["time"]["total_s"] / 3600 * 4 * 2.0)
    page = html.read_text()
    assert "Memory of each pipeline rank" in page and page.count("<svg") == 4
    result = CliRunner().invoke(app, [*arguments, "--ranks", "2", "--budget", "1MiB"])
    assert result.exit_code == 1 and "does not fit" in result.stdout and "pipeline rank 1" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--ranks", "3"])
    assert result.exit_code == 2 and "does not divide the 3 ranks" in result.output


def test_layers_that_will_be_cut_are_refused():
    settings = load({**config(1), "tensor_parallel": {"autotp_size": 2}})
    with pytest.raises(ValueError, match="plans of pipelines count whole layers: plan without the section"):
        plan_pipeline(settings, planned_model.piped, 8, Options(device="cpu"))


def test_micro_batches_in_flight():
    assert [in_flight_of(make("1f1b", 4, 8), rank, {}) for rank in range(4)] == [
        {0: 4},
        {1: 3},
        {2: 2},
        {3: 1},
    ]
    assert in_flight_of(make("gpipe", 2, 5), 1, {}) == {1: 5}
    assert sum(in_flight_of(make("zb-v", 2, 6), 0, {}).values()) == 4
