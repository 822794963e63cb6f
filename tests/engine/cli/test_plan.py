"""`ds plan`: a configuration and a factory in, a table out."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_engine.build.memory.plan import load_factory
from ds_engine.cli import offload_rates
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

def real():
    return only(), torch.zeros(3, 512)

def wrong():
    return 5

def broken():
    raise TypeError("no model today")
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


def test_activations_that_are_moved_are_counted(tmp_path: Path) -> None:
    section = {"device": "nvme", "nvme_path": str(tmp_path), "min_bytes": 1024}
    code, text = ds_plan(tmp_path, activation_offload=section)
    assert code == 0 and "16.0 KiB of activations leave the device in each forward" in text
    assert "and 16.0 KiB on a disk" in text


def test_rates_of_offload_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        offload_rates, "with_measured_rates", partial(offload_rates.with_measured_rates, num_bytes=1 << 20)
    )
    offload = {
        "budget": {"device": 0, "host": "16MB", "nvme_path": str(tmp_path)},
        "rates": {"disk_read": "1GB"},
    }
    more = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "offload": offload}
    code, text = ds_plan(tmp_path, "--measure-offload", factory="only", **more)
    assert code == 0 and "not measured" not in text
    measured = json.loads(text.partition('"offload": ')[2].splitlines()[0])["rates"]
    assert {"host", "disk_write"} <= measured.keys() and "disk_read" not in measured
    assert all(rate > 1e6 for rate in measured.values())
    assert "not measured" in ds_plan(tmp_path, factory="only", **more)[1]
    code, text = ds_plan(tmp_path, "--measure-offload", factory="only")
    assert code == 2 and "no offload.budget" in text


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device tpu: torch has no such device type"),
        (["--budget", "80"], "'80' has no unit: write 80GiB, 80GB or 80B"),
        (["--compare", "1,x"], "--compare 1,x: write numbers of ranks"),
        (["--compare", "0"], "--compare 0: write numbers of ranks"),
        (["--tokens", "8"], "--tokens is only for Hugging Face models"),
    ],
)
def test_options_that_cannot_be_meant_are_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, text = ds_plan(tmp_path, *arguments)
    assert code == 2 and message in text and "Traceback" not in text


def test_an_error_in_the_factory_is_one_line_with_its_place(tmp_path: Path) -> None:
    code, text = ds_plan(tmp_path, factory="broken")
    assert code == 2 and "failed: TypeError: no model today" in text and "job.py:20" in text
    (tmp_path / "bad.py").write_text("def make(:")
    code, text = ds_plan(tmp_path, "--model", f"{tmp_path / 'bad.py'}:make")
    assert code == 2 and "cannot be imported: SyntaxError" in text


def test_every_stage_on_several_numbers_of_ranks(tmp_path: Path) -> None:
    arguments = ("--compare", "1,3", "--budget", "6MB")
    sizes = {"train_micro_batch_size_per_gpu": None, "train_batch_size": 4}
    code, text = ds_plan(tmp_path, *arguments, factory="only", **sizes)
    assert code == 1 and "stage 3" in text and "x: does not fit in 5.7 MiB" in text
    assert "train_batch_size 4 = " in " ".join(text.split())  # 3 ranks cannot share 4 samples
    sizes = {"train_batch_size": None}
    arguments = ("--compare", "1,4", "--budget", "7MB", "--json")
    code, text = ds_plan(tmp_path, *arguments, factory="only", **sizes)
    assert code == 0 and {cell["fits"] for cell in json.loads(text)["cells"]} == {True, False}
    cells = {(cell["stage"], cell["ranks"]): cell["device_bytes"] for cell in json.loads(text)["cells"]}
    assert len(cells) == 8 and cells[0, 4] >= cells[1, 4] > cells[3, 4]
    code, single = ds_plan(tmp_path, "-n", "4", "--json", factory="only", zero_optimization={"stage": 3})
    assert json.loads(single)["device_bytes"] == cells[3, 4]


RATES = {
    "price_per_rank_hour": 2.0,
    "flops_per_s": 1e9,
    "memory_bytes_per_s": 1e9,
    "link": {"latency_s": 1e-5, "bytes_per_s": 1e8},
}


def test_time_and_picture_of_every_stage(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    rates = ("--rates", str(tmp_path / "rates.json"))
    code, text = ds_plan(tmp_path, "-n", "2", "--json", *rates, zero_optimization={"stage": 0})
    time = json.loads(text)["time"]
    # Two products of 4 x 512 x 512, 2 FLOPs each, thrice; the first layer's input needs no gradient.
    flops = 2 * 4 * 512 * 512 * 2 * 3 - 2 * 4 * 512 * 512
    assert code == 0 and time["compute_s"] == pytest.approx(flops / 1e9 + 2 * 4 * NUMEL / 1e9, rel=0.02)
    assert time["messages_s"] == pytest.approx(4 * NUMEL / 1e8, rel=0.02)
    html = tmp_path / "plan.html"
    arguments = ("--compare", "1,1024", "--json", "--html", str(html), *rates)
    code, text = ds_plan(tmp_path, *arguments)
    cells = {(cell["stage"], cell["ranks"]): cell for cell in json.loads(text)["cells"]}
    assert code == 0 and cells[0, 1]["sent_bytes"] == 0 < cells[0, 1024]["sent_bytes"]
    assert cells[0, 1]["step_s"] < cells[0, 1024]["step_s"]
    assert cells[2, 1024]["samples_per_s"] == pytest.approx(4096 / cells[2, 1024]["step_s"])
    titles = re.findall(r"<figcaption>([^<]*)<", html.read_text())
    assert [title.split()[0] for title in titles] == ["Peak", "Sent", *["Predicted"] * 3]
    code, text = ds_plan(tmp_path, "-n", "2", "--html", str(html), "--steps", "100", *rates)
    assert code == 0 and "for a million samples" in text and "the whole run" in text
    page = html.read_text()
    assert re.findall(r"<figcaption>([^<]*)<", page) == [
        "Memory of a rank in each phase",
        "Time of a step",
        "Messages of a rank in a step, by axis",
    ]
    assert "forward and backward" in page and "data" in page
    code, text = ds_plan(tmp_path, *rates, factory="only")
    assert code == 2 and "needs the inputs of a forward" in " ".join(text.split())


def test_the_rates_of_this_machine_are_measured_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ds_engine.launch

    # In this process: what the command starts in new ones.
    monkeypatch.setattr(
        ds_engine.launch, "notebook", lambda function, ranks, *given: [function(*given)] * ranks
    )
    file = tmp_path / "rates.json"
    code, text = ds_plan(tmp_path, "--measure", "1", "--rates", str(file), "--json", factory="real")
    assert code == 0, text
    measured = json.loads(file.read_text())
    assert 1e7 < measured["forward_flops_per_s"] < 1e13 and 1e7 < measured["memory_bytes_per_s"] < 1e12
    assert json.loads(text)["time"]["total_s"] > 0


def test_a_model_of_hugging_face_by_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="reads config.json")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"vocab_size": 32, "max_position_embeddings": 16, "architectures": ["LlamaForCausalLM"]}
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **more}))
    activations = []
    for tokens in ([], ["--tokens", "4"]):
        code, text = ds_plan(tmp_path, "--json", "--model", str(folder), *tokens)
        found = json.loads(text)
        assert code == 0 and found["model"] == "LlamaForCausalLM", text
        backward = next(phase for phase in found["phases"] if phase["phase"] == "backward")
        activations.append(backward["parts"]["activations"])
    assert activations[0] > 3 * activations[1] > 0
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    more = ("--json", "--model", str(folder), "-n", "4", "--rates", str(tmp_path / "rates.json"))
    code, text = ds_plan(tmp_path, *more, tensor_parallel={"autotp_size": 2})
    # A rank of two sends an activation, (4, 16, 16) fp32, twice in the forward and for q, k, v, gate and up in the
    # backward; once for the embedding, and in both directions for the output layer, which is half as large.
    sent = {one["axis"]: (one["ranks"], one["sent_bytes"]) for one in json.loads(text)["axes"]}
    assert code == 0 and sent["tensor"] == (2, 10 * 4 * 16 * 16 * 4) and sent["data"][0] == 2
    code, text = ds_plan(tmp_path, *more, sequence_parallel_size=2)
    # Ulysses: 4 N h (P - 1) / P^2 elements in each direction for as many key heads, N tokens of all ranks.
    sent = {one["axis"]: (one["ranks"], one["sent_bytes"]) for one in json.loads(text)["axes"]}
    assert code == 0 and sent["sequence"] == (2, pytest.approx(2 * 4 * (4 * 16) * 16 // 4 * 4, rel=0.1))
    code, text = ds_plan(tmp_path, "--model", str(folder / "config.json"), "--tokens", "17")
    assert code == 2 and "--tokens 17: the model accepts at most 16" in text
    for wrong, message in (
        (tmp_path / "gone.json", "there is no file"),
        (tmp_path / "ds.json", "not a configuration of"),
    ):
        code, text = ds_plan(tmp_path, "--model", str(wrong))
        assert code == 2 and message in text and "Traceback" not in text


def test_sizes_and_modules() -> None:
    for text, wanted in {
        "24GiB": 24 * 2**30,
        "24Gi": 24 * 2**30,
        "1.5 gb": 15 * 10**8,
        "80G": 80 * 10**9,
        "80GB": 80 * 10**9,
        "7B": 7,
        "1e3kb": 10**6,
    }.items():
        assert parse_bytes(text) == wanted, text
    for text in ("24 apples", "GB", "", "-1GB"):
        with pytest.raises(ValueError, match="not a size"):
            parse_bytes(text)
    for text in ("1e6", "80", "0.5"):
        with pytest.raises(ValueError, match="has no unit"):
            parse_bytes(text)
    assert load_factory("json:loads")("1") == 1
    with pytest.raises(ValueError, match="no module nowhere"):
        load_factory("nowhere:f")
