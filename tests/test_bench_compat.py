"""What `ci/bench compat` calls equal, and when it believes an answer that it has kept."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import bench_compat

CELL = bench_compat.Cell("plain", "gpt2", "fp32", 4, 2, 20)


def test_curves_differ_by_their_worst_point() -> None:
    assert bench_compat.deviation([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]) == 0
    assert bench_compat.deviation([1.0, 2.2, 4.0], [1.0, 2.0, 4.0]) == pytest.approx(0.1)
    assert bench_compat.deviation([1.0], [1.0, 2.0]) == math.inf
    assert bench_compat.deviation([1.0, math.nan], [1.0, math.nan]) == math.inf


def test_an_answer_is_kept_for_the_same_script_options_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    for name in ("plain.py", "common.py"):
        (jobs / name).write_text("first")
    # Stands for several.py: counts its starts, and answers for each case.
    (jobs / "several.py").write_text(
        "import json, sys, pathlib\n"
        "cases = json.loads(pathlib.Path(sys.argv[2]).read_text())\n"
        "with open(pathlib.Path(__file__).with_name('starts'), 'a') as f: f.write('x' * len(cases))\n"
        "for c in cases:\n"
        "    if '--bf16' in c['options']: pathlib.Path(c['out'] + '.log').write_text('no such mix')\n"
        "    else: pathlib.Path(c['out']).write_text(json.dumps({'losses': [1.0], 'micro_losses': [2.0, 3.0]}))\n"
        "    print('something else', json.dumps({'out': c['out']}), sep='\\n', flush=True)\n"
    )
    monkeypatch.setattr(bench_compat, "JOBS", jobs)
    monkeypatch.setattr(bench_compat.Side, "_versions", lambda self: ["1"])
    other, broken = replace(CELL, stage=3), replace(CELL, precision="bf16")

    def ask(*cells: bench_compat.Cell) -> tuple[int, dict[bench_compat.Cell, list[float]], dict]:
        (jobs / "starts").write_text("")
        side = bench_compat.Side(sys.executable, 60, tmp_path, tmp_path / "kept")
        found = side.losses(list(cells))
        return len((jobs / "starts").read_text()), found, side.errors

    assert ask(CELL, other) == (2, {CELL: [2.0, 3.0], other: [2.0, 3.0]}, {})
    assert ask(CELL, other)[0] == 0
    started, found, errors = ask(other, broken)
    assert started == 1 and found == {other: [2.0, 3.0]} and errors == {broken: "no such mix"}
    assert ask(broken)[0] == 1  # a failure is tried again
    (jobs / "common.py").write_text("second")
    assert ask(CELL)[0] == 1
    monkeypatch.setattr(bench_compat.Side, "_versions", lambda self: ["2"])
    assert ask(CELL)[0] == 1
    assert json.loads(next((tmp_path / "kept").iterdir()).read_text()) == [2.0, 3.0]
