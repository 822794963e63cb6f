"""The main job: its parts, and that a training which was killed goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "gpt"
SMALL = ["--layers", "2", "--dim", "64", "--heads", "2", "--context", "32", "--checkpoint-every", "3"]
SMALL += ["--validate-every", "4", "--validation-windows", "64", "--sample-bytes", "4"]


@pytest.fixture
def example(monkeypatch):
    """The example's modules by name; they are dropped afterwards, since their names are common ones."""
    names = ["data", "live", "model", "runs", "train"]
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


# ---- parts --------------------------------------------------------------------------------------------------------


def test_files_are_split_and_none_is_in_both_parts(example, tmp_path):
    data = example("data")
    for i in range(200):
        (tmp_path / f"m{i}.py").write_text(f"value_{i} = {i}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").write_text("skipped")
    corpus = data.load(tmp_path)
    train, validation = (bytes(part.numpy()).split(b"\0")[:-1] for part in (corpus.train, corpus.validation))
    assert not set(train) & set(validation)
    assert {*train, *validation} == {f"value_{i} = {i}\n".encode() for i in range(200)}
    assert 3 <= len(validation) <= 30
    assert corpus.num_files == 200


def test_no_sources_is_an_error_that_says_so(example, tmp_path):
    with pytest.raises(ValueError, match="no Python sources below"):
        example("data").load(tmp_path)


def test_batches_depend_on_seed_and_index_only(example):
    data = example("data")
    text = torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    inputs, targets = data.train_batch(text, seed=1, index=7, size=4, length=16)
    torch.rand(3)  # the global generator has no say
    again, _ = data.train_batch(text, seed=1, index=7, size=4, length=16)
    assert torch.equal(inputs, again)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for other in (dict(seed=1, index=8), dict(seed=2, index=7)):
        assert not torch.equal(inputs, data.train_batch(text, **other, size=4, length=16)[0])


def test_bigram_is_the_smoothed_conditional_frequency(example):
    data = example("data")
    bigram = data.Bigram(torch.tensor([*b"abababac"], dtype=torch.uint8))
    # after "a": "b" three times, "c" once
    expected = -math.log((3 + data.SMOOTHING) / (4 + 256 * data.SMOOTHING))
    assert bigram.loss(torch.tensor([[ord("a")]]), torch.tensor([[ord("b")]])) == pytest.approx(
        expected, rel=1e-12
    )


def test_model_looks_back_only(example):
    torch.manual_seed(0)
    model = example("model").GPT(layers=2, dim=32, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])
    assert not torch.allclose(before[:, 11], after[:, 11])  # and far enough back
    loss = torch.nn.functional.cross_entropy(before[:, :-1].reshape(-1, 256), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), loss)


def test_default_model_has_about_ten_million_parameters(example):
    with torch.device("meta"):
        model = example("model").GPT()
    assert 9e6 < sum(p.numel() for p in model.parameters()) < 12e6


def test_a_run_is_continued_until_it_is_finished(example, tmp_path):
    runs = example("runs")
    first = runs.choose(tmp_path, {"steps": 3})
    assert first == tmp_path / "001"
    assert runs.choose(tmp_path, {"steps": 3}) == first
    assert runs.choose(tmp_path, {"steps": 4}) == tmp_path / "002"
    assert runs.choose(tmp_path, {"steps": 4}) == tmp_path / "002"
    (tmp_path / "002" / "result.json").write_text("{}")
    assert runs.choose(tmp_path, {"steps": 4}) == tmp_path / "003"


def test_a_log_forgets_what_was_not_saved(example, tmp_path):
    runs = example("runs")
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = runs.Log(path, first_step=3)
    log.write(step=3, loss=0.5)
    log.close()
    assert runs.read_log(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_float32_where_the_cpu_lacks_bfloat16(example, monkeypatch):
    train = example("train")
    monkeypatch.setattr(train, "bf16_is_native", lambda: False)
    config, notes = train.settings_for(train.arguments([]))
    assert config["bf16"]["enabled"] is False
    assert any("float32" in note for note in notes)
    monkeypatch.setattr(train, "bf16_is_native", lambda: True)
    config, notes = train.settings_for(train.arguments(["--steps", "5"]))
    assert config["bf16"]["enabled"] is True
    assert config["scheduler"]["params"]["total_num_steps"] == 5
    assert notes == []


# ---- the whole job ------------------------------------------------------------------------------------------------


def test_the_format_of_states_goes_into_the_configuration(example):
    train = example("train")
    config, notes = train.settings_for(train.arguments(["--state-dtype", "int8"]))
    assert config["optimizer"]["params"]["state_dtype"] == "int8"
    assert "optimizer states in int8" in notes
    assert "state_dtype" not in train.settings_for(train.arguments([]))[0]["optimizer"]["params"]


def start(runs: Path, *more: str) -> subprocess.Popen[str]:
    """The job with a small model, in its own process group."""
    command = [sys.executable, "-m", "ds_engine", "run", str(EXAMPLE / "train.py")]
    command += ["--config", str(EXAMPLE / "ds_config.json"), "--runs", str(runs), *SMALL, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        stop(process, signal.SIGKILL)
    return process.returncode, output


def stop(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Sends a signal to everything that the job started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def losses(run: Path) -> list[tuple[int, float]]:
    path = run / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(done >= step for done, _ in losses(run)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"the job ended or hung before step {step}:\n{finish(process)[1]}")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(run directory, exit status, output) of a job of 12 steps that nobody stopped."""
    runs = tmp_path_factory.mktemp("undisturbed")
    status, output = finish(start(runs, "--steps", "12"))
    assert len(losses(runs / "001")) == 12, output
    return runs / "001", status, output


def test_a_model_that_learned_nothing_fails_the_job(undisturbed):
    run, status, output = undisturbed
    assert status != 0
    assert "FAILED: the model is not clearly better than the bigram model" in output
    assert "bigram model:" in output
    assert json.loads((run / "result.json").read_text())["passed"] is False


def test_a_run_leaves_page_sample_and_checkpoints(undisturbed):
    run, _, output = undisturbed
    page = (run / "report.html").read_text()
    titles = re.findall(r"<figcaption>([^<]*)<", page)
    assert titles[:3] == ["Loss", "Learning rate", "Gradient norm before clipping"]
    assert [title.split(",")[0] for title in titles[3:]] == ["Throughput", "Memory of rank 0"]
    names = re.findall(r"</i>([^<]*)</span>", page)
    assert names[:2] == ["train", "validation"] and names[2].startswith("bigram ")
    assert "parameters" in page and "WarmupCosineLR" in page and "duration" in page
    assert (run / "sample.txt").read_text().startswith("def ")
    assert f"run {run}: starting at step 1 of 12" in output.replace("\n", "")
    assert list((run / "checkpoints").iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_stopped_job_continues_with_the_same_losses(undisturbed, tmp_path, number):
    process = start(tmp_path, "--steps", "12")
    wait_for_step(process, tmp_path / "001", 5)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does; the launcher passes it on, too
        output, _ = process.communicate(timeout=60)
        saved = re.search(r"stopped and saved after step (\d+): start it again", output)
        assert saved, output
        assert len(losses(tmp_path / "001")) == int(saved.group(1)) < 12
        assert "Traceback" not in output
        assert process.returncode == 130
    else:
        stop(process, signal.SIGKILL)
        process.communicate(timeout=60)
    assert not (tmp_path / "001" / "result.json").exists()

    _, output = finish(start(tmp_path, "--steps", "12"))
    assert "continuing after step" in output
    assert losses(tmp_path / "001") == losses(undisturbed[0])
    assert not (tmp_path / "002").exists()

    if number == signal.SIGINT:
        return
    _, output = finish(start(tmp_path, "--steps", "1"))
    assert "002: starting at step 1 of 1" in output.replace("\n", "")
