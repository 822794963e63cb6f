"""`ds comm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ds_comm.bench import Timing
from ds_engine.cli import comm
from ds_engine.config import load


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(comm.app, ["bench", *arguments])


def test_collectives_and_links_of_new_ranks_are_measured(tmp_path: Path) -> None:
    bare = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [
        "-m",
        "ds_engine",
        "comm",
        "bench",
        "--ranks",
        "2",
        "--sizes",
        "1KiB,1MiB",
        "--rounds",
        "1",
        "--json",
        "--out",
        str(tmp_path / "links.json"),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=bare, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["measured"]
    of_gloo = [row for row in rows if row["transport"] == "gloo"]
    assert {row["bytes"] for row in of_gloo} == {1024, 1 << 20}
    assert len(of_gloo) == 10
    assert {row["transport"] for row in rows} <= {"gloo", "same host"}
    assert all(row["seconds"] > 0 and row["ranks"] == 2 for row in rows)
    links = load(tmp_path / "links.json").links  # the configuration accepts what was written
    assert links is not None and links.within_host is not None
    assert links.between_hosts is None
    assert links.within_host.rate > 0 and links.within_host.latency_us > 0
    assert links.codecs.sign is not None and links.codecs.int4 is not None and links.codecs.int8 is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--collectives", "all_reduce,gather"], "no collective 'gather'"), (["--sizes", "1KiB,many"], "many")],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_bandwidth_counts_the_bytes_that_must_be_sent(capsys: pytest.CaptureFixture[str]) -> None:
    timings = [
        Timing(collective=name, transport="gloo", num_bytes=4_000_000, ranks=4, seconds=0.001)
        for name in ("all_reduce", "broadcast")
    ]
    assert [t.bytes_per_s for t in timings] == [6e9, 4e9]  # of a broadcast, those of the root
    comm._show(timings, False)
    assert "4.000" in capsys.readouterr().out
