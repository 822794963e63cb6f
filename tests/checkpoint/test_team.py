"""Ranks that act together fail together, with one text that names whoever failed, or is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch.distributed as dist

from ds_checkpoint import CheckpointError
from ds_checkpoint.team import Team
from harness import ranks


@ranks(1, 2)
@pytest.mark.parametrize("error", [FileNotFoundError, IsADirectoryError, UnicodeDecodeError, OSError])
def test_what_fails_on_rank_0_is_raised_on_every_rank(error: type[Exception]) -> None:
    def fail() -> str:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad") if error is UnicodeDecodeError else error("x")

    wanted = FileNotFoundError if error is FileNotFoundError else CheckpointError
    team = Team()
    with pytest.raises(wanted) as raised:
        team.by_first("looking", fail if team.first else lambda: pytest.fail("rank 0 alone"))
    if wanted is CheckpointError:
        assert f"looking failed on rank 0: {error.__name__}" in str(raised.value)
    assert team.by_first("looking", lambda: "there") == "there"


@ranks(2)
def test_together() -> None:
    team = Team()
    assert team.together("adding", lambda: team.rank + 1) == team.rank + 1

    def fail() -> None:
        if dist.get_rank() == 1:
            raise ZeroDivisionError("a mistake")

    with pytest.raises(
        CheckpointError, match="adding failed on 1 of 2 ranks; rank 1: ZeroDivisionError: a mistake"
    ):
        team.together("adding", fail)


DYING = """
    import os, sys, time
    import torch.distributed as dist
    from ds_checkpoint import CheckpointError, team

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=4)
    team.ANSWER_S = 3.0
    dist.barrier()
    if rank == 2:
        os._exit(9)
    try:
        team.Team().settle(None, "saving")
        # Not every rank is a neighbour of the one that is gone in every collective; in the end each has heard.
        for _ in range(3):
            team.Team().gather(b"x")
            team.Team().share(b"x")
    except CheckpointError as error:
        print(error, flush=True)
        time.sleep(5)  # a script that goes on: the others must not wait for its end
        os._exit(3)
    os._exit(0)
"""


def test_a_rank_that_dies_is_named_by_all_others(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(textwrap.dedent(DYING))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(4)
    ]
    said = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [3, 3, 9, 3], said
    for rank in (0, 1, 3):
        assert f"noticed by rank {rank}" in said[rank][0]
        assert "rank 2 did not answer within 3 s" in said[rank][0], said[rank][0]
