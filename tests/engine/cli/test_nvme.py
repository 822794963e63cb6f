"""`ds nvme`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ds_core.io.speed import Rate, Setting, SpeedTest, best
from ds_engine.cli import nvme
from ds_engine.config import load


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(nvme.app, [*arguments])


def rate(block_bytes: int, queue_depth: int, num_threads: int, both: float) -> Rate:
    return Rate(Setting(block_bytes, queue_depth, num_threads), both, both, "threads", True)


class PretendedTest:
    """A disk that likes blocks of 4 MiB, 8 in flight and two threads."""

    def __init__(self) -> None:
        self.measured: list[Setting] = []

    def measure(self, setting: Setting) -> Rate:
        self.measured.append(setting)
        steps = abs(math.log2(setting.block_bytes / (4 << 20))) + abs(math.log2(setting.queue_depth / 8))
        speed = 1e9 / (1 + steps)
        return Rate(setting, speed, speed * (2 if setting.num_threads == 2 else 1), "threads", True)


def test_tune_prints_a_section_that_a_configuration_takes_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    out = tmp_path / "aio.json"
    done = invoke("tune", str(disk), "--size", "64KiB", "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert len(result["measured"]) == len(nvme._BLOCKS) * len(nvme._DEPTHS) + len(nvme._THREADS)
    assert all(row["write_bytes_per_s"] > 0 and row["read_bytes_per_s"] > 0 for row in result["measured"])
    assert json.loads(out.read_text()) == {"aio": result["aio"], "offload": result["offload"]}
    settings = load(json.loads(out.read_text()))
    aio, rates = settings.aio, settings.offload.rates
    best = max(result["measured"], key=lambda row: row["read_bytes_per_s"])
    assert 0 < rates.disk_read <= best["read_bytes_per_s"] and rates.disk_write > 0 and rates.host > 1e8
    assert aio.block_size == result["aio"]["block_size"]
    assert list(disk.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aio.json", "disk"]


def test_bench_takes_the_section_of_a_configuration(tmp_path: Path) -> None:
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"aio": {"block_size": 8192, "queue_depth": 3, "intra_op_parallelism": 2}}))
    done = invoke("bench", str(tmp_path), "--size", "100KB", "--config", str(config), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)["aio"]
    assert (result["block_size"], result["queue_depth"], result["intra_op_parallelism"]) == (8192, 3, 2)
    done = invoke("bench", str(tmp_path), "--size", "100KB", "--config", str(config), "--block-size", "16KiB")
    assert done.exit_code == 0, done.output
    assert "16         3            2" in done.stdout


def test_refusals(tmp_path: Path) -> None:
    for arguments, message in (
        ((str(tmp_path), "--size", "100000TiB"), "only written where there is twice as much"),
        ((str(tmp_path), "--size", "12"), "has no unit"),
        ((str(tmp_path / "absent"),), "is not a folder"),
    ):
        done = invoke("tune", *arguments)
        assert done.exit_code == 2
        assert message in done.output
    assert list(tmp_path.iterdir()) == []


def test_the_sweep_varies_threads_at_the_best_block_and_depth() -> None:
    test = PretendedTest()
    rates = nvme.sweep(test, 60, lambda text: None)  # type: ignore[arg-type]
    assert len(set(test.measured)) == len(test.measured) == len(rates)
    assert [s for s in test.measured if s.num_threads > 1] == [Setting(4 << 20, 8, n) for n in (2, 4, 8)]
    assert best(rates).setting == Setting(4 << 20, 8, 2)


def test_the_sweep_ends_in_time() -> None:
    times: Iterator[float] = iter([0.0, 10.0, 20.0, 30.0, 40.0])
    rates = nvme.sweep(PretendedTest(), 25, lambda text: None, lambda: next(times))  # type: ignore[arg-type]
    assert len(rates) == 3
    times = iter([0.0, 10.0, 20.0])
    assert len(nvme.sweep(PretendedTest(), 0, lambda text: None, lambda: next(times))) == 1  # type: ignore[arg-type]


def test_among_equals_the_one_with_least_memory_wins() -> None:
    rates = [rate(1 << 20, 32, 1, 100.0), rate(1 << 20, 8, 1, 98.0), rate(1 << 18, 8, 1, 90.0)]
    assert best(rates) is rates[1]


def test_the_file_has_no_name_and_its_bytes_are_counted(tmp_path: Path) -> None:
    with SpeedTest(tmp_path, 50_000) as test:
        assert list(tmp_path.iterdir()) == []
        measured = test.measure(Setting(4096, 2, 1), rounds=2)
        assert test.bytes_written == 3 * 50_000
        assert measured.write > 0 and measured.read > 0
    with pytest.raises(OSError, match="twice as much"):
        SpeedTest(tmp_path, 1 << 60)
