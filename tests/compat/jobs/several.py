"""Runs a job of this folder several times, each time with other options, in one start of Python.

    python several.py JOB CASES RANKS TIMEOUT_S

CASES is a JSON file: a list of {"options": [...], "out": path}. What takes longest in a small job are the imports: they
are made once, here, and every rank of every case is a fork of this process, in the state that it has after them. No
process group, no thread and no setting is made before a fork. A job that fails leaves `out` + ".log" and no `out`.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

JOBS = Path(__file__).resolve().parent


def import_what_jobs_import() -> None:
    """And what those import on first use; without this the rest works too, only slower."""
    sys.path.insert(0, str(JOBS))
    import accelerate
    import accelerate.utils.deepspeed  # noqa: F401
    import common  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        T5ForConditionalGeneration,
        Trainer,
        TrainingArguments,
    )

    import deepspeed

    deepspeed.initialize, deepspeed.DeepSpeedEngine, deepspeed.zero.Init  # noqa: B018 - names are looked up late


def rank_of(job: str, case: dict[str, Any], rank: int, ranks: int, port: int) -> NoReturn:
    """The forked process."""
    os.setsid()
    log = os.open(case["out"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_PORT=str(port))
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    sys.argv = [str(JOBS / f"{job}.py"), f"--out={case['out']}", *case["options"]]
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(job: str, case: dict[str, Any], ranks: int, timeout_s: float) -> bool:
    """All ranks of one case; the first that fails ends the others."""
    port, running = free_port(), {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            rank_of(job, case, rank, ranks, port)
        running[pid] = rank
    good, end = True, time.monotonic() + timeout_s
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.pop(pid)
            good &= status == 0
        if (not good or time.monotonic() > end) and running:
            good = False
            for other in running:
                os.kill(other, signal.SIGKILL)
            for other in list(running):
                os.waitpid(other, 0)
            running.clear()
        if not pid:
            time.sleep(0.02)
    if not good:
        Path(case["out"]).unlink(missing_ok=True)
    return good


def main() -> int:
    job, cases, ranks, timeout_s = sys.argv[1:]
    import_what_jobs_import()
    good = True
    for case in json.loads(Path(cases).read_text()):
        start = time.monotonic()
        done = run(job, case, int(ranks), float(timeout_s))
        good &= done
        print(
            json.dumps({"out": case["out"], "good": done, "s": round(time.monotonic() - start, 1)}),
            flush=True,
        )
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
