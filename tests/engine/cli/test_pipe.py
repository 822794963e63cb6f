"""`ds pipe`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from ds_engine.cli import pipe


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(pipe.app, [*map(str, arguments)])


@pytest.mark.parametrize(
    "ending, start", [("html", b"<!doctype html>"), ("svg", b"<svg"), ("png", b"\x89PNG")]
)
def test_draw_writes_a_picture_and_says_what_it_shows(ending, start, tmp_path):
    out = tmp_path / f"a.{ending}"
    done = invoke("draw", "1f1b", "--ranks", 4, "--micro-batches", 8, "--out", out)
    assert done.exit_code == 0, done.output
    assert "bubble: 27.3%" in done.output
    assert out.read_bytes().startswith(start)


def test_draw_reads_a_file_and_refuses_a_deadlock_with_its_cycle(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("0F0,,0B0\n,1F0,1B0\n")
    done = invoke("draw", file, "--out", tmp_path / "a.svg")
    assert done.exit_code == 0 and "schedule: mine" in done.output
    file.write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B1,1B0")
    done = invoke("draw", file, "--out", tmp_path / "b.svg")
    assert done.exit_code == 2 and "rank 0 waits at 0B0 for 1B0" in done.output
    assert not (tmp_path / "b.svg").exists()


def test_choose_names_the_best_and_fails_if_nothing_fits(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"stages": [{"activation_bytes": 1 << 20}] * 8}))
    done = invoke("choose", "--costs", file, "--json")
    result = json.loads(done.output)
    assert done.exit_code == 0 and result["best"] == result["candidates"][0]["schedule"]
    assert result["candidates"][0]["bubble"] == pytest.approx(0)
    table = invoke("choose", "--costs", file, "--memory", "4MiB")
    assert table.exit_code == 0 and "best: zb-v-" in table.output
    assert invoke("choose", "--costs", file, "--memory", "1MiB").exit_code == 1
    assert invoke("choose", "--costs", tmp_path / "absent.json").exit_code == 2


def test_mistakes_are_named(tmp_path):
    assert "did you mean '1f1b'" in invoke("draw", "1f1", "--out", tmp_path / "a.svg").output
    assert "has to end in .html" in invoke("draw", "1f1b", "--out", tmp_path / "a.gif").output
