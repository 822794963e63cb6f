"""Two processes, each a host, write copies; one host ends at each of the moments of a write, and the other one resumes.

Processes are forked from this one, which has imported everything: a moment takes a fraction of a second.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

import ds_checkpoint
from ds_checkpoint import LostRanksError, MemoryCopies, team
from ds_checkpoint.memory import copies, host_folder, transfer
from ds_checkpoint.memory.host_folder import HostFolder

MOMENTS: list[tuple[Any, str]] = [
    (copies, "write_file"),
    (copies, "replicate"),
    (transfer, "damage"),
    (copies.MemoryCopies, "_whole"),
    (copies, "_write_manifest"),
    (HostFolder, "commit"),
    (HostFolder, "keep_only"),
]


class Case(NamedTuple):
    """A host that ends at a moment."""

    folder: Path
    moment: int
    after: bool
    dying: int


def state(step: int) -> torch.nn.Module:
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, float(step))
    return model


def end_in(owner: Any, name: str, *, after: bool) -> None:
    """This process ends before or after that function's next call."""
    function: Callable[..., Any] = getattr(owner, name)

    def ending(*arguments: Any, **options: Any) -> None:
        if after:
            function(*arguments, **options)
        os._exit(0)

    setattr(owner, name, ending)


def write(case: Case, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{case.folder}/store", rank=rank, world_size=2)
    kept = MemoryCopies(job="job")
    ds_checkpoint.save_copy(kept, state(1), extra={"step": 1})
    if rank == case.dying:
        end_in(*MOMENTS[case.moment], after=case.after)
    committed = MOMENTS[case.moment][1] == "keep_only"  # nothing is awaited after the commits
    with nullcontext() if committed else pytest.raises(LostRanksError, match=f"rank {case.dying}|store"):
        ds_checkpoint.save_copy(kept, state(2), extra={"step": 2})


def resume(case: Case) -> None:
    kept, model = MemoryCopies(job="job"), state(0)
    extra = ds_checkpoint.resume(case.folder / "disk", kept, model)
    assert extra is not None, sorted(map(str, kept.path.rglob("*")))
    assert torch.equal(model.weight, state(extra["step"]).weight)
    before_commit = case.moment < 5
    assert not before_commit or extra == {"step": 1}, "not every host had the new one"
    assert MOMENTS[case.moment][1] != "keep_only" or extra == {"step": 2}
    ds_checkpoint.save_copy(kept, model, extra={"step": 3})
    (left,) = kept.path.iterdir()
    assert left.name == f"copy{extra['step'] + 1:08d}"


def forked(case: Case, rank: int, action: Callable[[], None]) -> int:
    """Returns the id of a process that plays a host."""
    pid, name = os.fork(), f"host-{rank}"
    if pid:
        return pid
    code = 1
    try:
        (case.folder / name).mkdir(exist_ok=True)
        os.environ[host_folder.BASE] = str(case.folder / name)
        socket.gethostname = lambda: name
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def main(root: Path) -> None:
    warnings.simplefilter("ignore")  # of one host alone
    ds_checkpoint.save(root / "imports", state(0))  # what is imported late is imported before the forks
    team.ANSWER_S = 0.5
    copies._boot_id = lambda: socket.gethostname()
    cases = [
        Case(root / f"{moment}-{after}-{dying}", moment, after, dying)
        for moment in range(len(MOMENTS))
        for after in (False, True)
        for dying in (0, 1)
    ]
    for case in cases:
        case.folder.mkdir()
    # All at once, because most of the time they wait.
    finish(
        {forked(case, rank, functools.partial(write, case, rank)): case for case in cases for rank in (0, 1)}
    )
    for case in cases:
        shutil.rmtree(case.folder / f"host-{case.dying}")
    finish({forked(case, 1 - case.dying, functools.partial(resume, case)): case for case in cases})
    print(len(cases))


def finish(running: dict[int, Case]) -> None:
    failed = [case.folder.name for pid, case in running.items() if os.waitpid(pid, 0)[1] != 0]
    assert not failed, failed


if __name__ == "__main__":
    main(Path(sys.argv[1]))
