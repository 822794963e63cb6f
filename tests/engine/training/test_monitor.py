"""Curves: what is written where, and what a missing package leads to."""

from __future__ import annotations

import csv
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ds_engine.config import ConfigError, load
from ds_engine.training.monitor import CsvWriter, Monitor


class Recorder(types.SimpleNamespace):
    """Stands for a module of a service: every call is recorded."""

    def __init__(self, **more: Any) -> None:
        super().__init__(calls=[], **more)

    def __getattr__(self, name: str) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return self

        return record


def test_csv_has_a_file_for_each_name_and_goes_on_in_it(tmp_path: Path) -> None:
    for _ in range(2):
        writer = CsvWriter(tmp_path / "job")
        writer.write([("Train/Samples/lr", 0.5, 8), ("Train/Samples/lr", 0.25, 16), ("other", 1, 16)])
        writer.close()
    with (tmp_path / "job" / "Train_Samples_lr.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [["step", "Train_Samples_lr"], ["8", "0.5"], ["16", "0.25"], ["8", "0.5"], ["16", "0.25"]]
    assert (tmp_path / "job" / "other.csv").read_text().splitlines() == ["step,other", "16,1", "16,1"]


def monitor(sections: dict[str, Any], rank: int = 0) -> Monitor:
    return Monitor.of(load({"train_batch_size": 1} | sections), rank)


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    made = monitor({"wandb": {"enabled": True, "project": "p", "team": "t", "group": "g"}})
    made.write_events([("a", 1.0, 16), ("b", 2.0, 8), ("c", 3.0, 16)])
    made.close()
    made.close()
    assert wandb.calls == [
        ("init", (), {"project": "p", "group": "g", "entity": "t"}),
        ("log", ({"b": 2.0},), {"step": 8}),
        ("log", ({"a": 1.0, "c": 3.0},), {"step": 16}),
        ("finish", (), {}),
    ]


def test_comet_writes_every_so_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    comet = Recorder()
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    section = {
        "enabled": True,
        "project": "p",
        "experiment_name": "n",
        "samples_log_interval": 10,
        "online": False,
    }
    made = monitor({"comet": section})
    for at in (4, 8, 12, 16, 24):
        made.write_events([("a", 1.0, at)])
    assert comet.calls[:2] == [("start", (), {"project": "p", "online": False}), ("set_name", ("n",), {})]
    assert [call[2]["step"] for call in comet.calls[2:]] == [4, 16]


def test_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    board = Recorder()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    made = monitor({"tensorboard": {"enabled": True, "output_path": str(tmp_path), "job_name": "j"}})
    made.write_events([("a", 1.0, 4)])
    made.close()
    assert board.calls == [
        ("SummaryWriter", (), {"log_dir": str(tmp_path / "j")}),
        ("add_scalar", ("a", 1.0, 4), {}),
        ("flush", (), {}),
        ("close", (), {}),
    ]


@pytest.mark.parametrize(
    ("section", "module", "package"),
    [
        ("wandb", "wandb", "wandb"),
        ("comet", "comet_ml", "comet_ml"),
        ("tensorboard", "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_a_package_that_is_not_there(
    section: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{section}.enabled is true.*pip install {package}"):
        monitor({section: {"enabled": True}})


def test_other_ranks_and_no_section_write_nothing(tmp_path: Path) -> None:
    section = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path)}}
    assert not monitor(section, rank=1).enabled and not monitor({}).enabled
    assert monitor(section).enabled


def test_a_full_disk_costs_lines_and_not_the_training(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    made = Monitor([CsvWriter(folder), CsvWriter(tmp_path / "other")])
    (folder / "a.csv").symlink_to("/dev/full")
    with pytest.warns(
        UserWarning, match=r"CsvWriter cannot write curves: \[Errno 28\] No space left.*Training continues"
    ):
        made.write_events([("a", 1.0, 8)])
    made.write_events([("a", 2.0, 16)])  # says nothing more: warnings are errors here
    assert (tmp_path / "other" / "a.csv").read_text().splitlines() == ["step,a", "8,1.0", "16,2.0"]
    (folder / "a.csv").unlink()  # there is space again
    made.write_events([("a", 3.0, 24)])
    assert (folder / "a.csv").read_text().splitlines() == ["step,a", "24,3.0"]
    made.close()


def test_a_line_that_a_full_disk_took_in_part_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CsvWriter(tmp_path)
    writer.write([("a", 1.0, 8)])
    opened = Path.open

    def fills_up(path: Path, *args: Any, **kwargs: Any) -> Any:
        with opened(path, "a") as file:
            file.write("16,2")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", fills_up)
    with pytest.raises(OSError, match="No space left"):
        writer.write([("a", 2.0, 16)])
    monkeypatch.setattr(Path, "open", opened)
    assert (tmp_path / "a.csv").read_text().splitlines() == ["step,a", "8,1.0"]


def test_a_job_writes_what_its_page_shows(tmp_path: Path) -> None:
    import json

    import torch

    import ds_engine
    from ds_profiler.report import page, read_run

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW"},
        "startup_summary": False,
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "first"},
    }
    for _ in range(2):
        engine, *_ = ds_engine.initialize(model=torch.nn.Linear(4, 1), config=config)
        for _ in range(3):
            engine.backward(engine(torch.ones(2, 4)).square().mean())
            engine.step()
        engine.destroy()
    run = read_run(tmp_path / "first")
    assert [x for x, _ in run.curves["Train_Samples_train_loss"]] == [2, 4, 6]
    assert [x for x, _ in run.curves["Train_Samples_samples_per_s"]] == [4, 6]
    assert min(value for _, value in run.curves["Train_Samples_memory_bytes"]) > 10 << 20
    assert len(run.starts) == 2 and "5 parameters" in run.facts["model"]
    assert json.loads(run.texts["Configuration"])["train_micro_batch_size_per_gpu"] == 2
    assert "Throughput" in page(run)
