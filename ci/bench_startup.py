"""Start-up: what `import ds_engine` costs over `import torch`, and `initialize` of the example's job per rank once the
process group stands; DeepSpeed beside it, in turn.

    ci/bench startup [--rounds N]

Ours runs in .venv (made by ci/train or ci/test), the peer in .venv-peer. Every round starts fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2

IMPORT = """
import time, sys
t = time.perf_counter(); import torch; a = time.perf_counter(); import {package}; b = time.perf_counter()
print("RESULT", b - a, int("torch._dynamo" in sys.modules))
"""

INITIALIZE = """
import json, os, sys, time
import torch, torch.distributed as dist
torch.set_num_threads(1)
sys.path.insert(0, "docs/examples/gpt")
from model import GPT
config = json.load(open("docs/examples/gpt/ds_config.json"))
dist.init_process_group("gloo"); dist.barrier()
torch.manual_seed(0)
{prepare}
t = time.perf_counter()
{initialize}
seconds = time.perf_counter() - t
print("RESULT", seconds, int("torch._dynamo" in sys.modules), flush=True)
dist.barrier(); dist.destroy_process_group(); os._exit(0)
"""
OURS = {
    "package": "ds_engine",
    "prepare": "model = GPT(); import ds_engine; config['startup_summary'] = False",
    "initialize": "ds_engine.initialize(model=model, config=config)",
}
THEIRS = {
    "package": "deepspeed",
    "prepare": "model = GPT(); import deepspeed; [config.pop(k, None) for k in ('scheduler', 'checkpoint', 'seed')]",
    "initialize": "deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)",
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(python: str, code: str, ranks: int) -> tuple[float, bool]:
    """Longest time over ranks, and whether torch's compiler was imported."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        env = dict(os.environ, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
        env |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        env |= {"LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [python, "-c", code],
                env=env,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    seconds, compiler = 0.0, False
    for process in processes:
        out, err = process.communicate(timeout=600)
        lines = [line.split() for line in out.splitlines() if line.startswith("RESULT")]
        if not lines:
            sys.exit(f"{python}: no result\n{out}\n{err}")
        seconds, compiler = max(seconds, float(lines[0][1])), compiler or lines[0][2] == "1"
    return seconds, compiler


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    sides = {"ds": (str(ROOT / ".venv/bin/python"), OURS)}
    if not args.no_peer:
        sides["DeepSpeed"] = (sys.executable, THEIRS)
    found: dict[str, dict[str, list[float]]] = {name: {"import": [], "initialize": []} for name in sides}
    compilers: dict[str, bool] = {}
    for _ in range(args.rounds):
        for name, (python, words) in sides.items():
            seconds, _ = run(python, IMPORT.format(**words), 1)
            found[name]["import"].append(seconds)
            seconds, compilers[name] = run(python, INITIALIZE.format(**words), RANKS)
            found[name]["initialize"].append(seconds)
    heads = [f"seconds, median (min) of {args.rounds}", "over `import torch`", f"`initialize`, {RANKS} ranks"]
    print(f"| {' | '.join(heads)} | torch._dynamo |")
    print("|---|---|---|---|")
    for name, times in found.items():
        cells = [f"{statistics.median(times[k]):.3f} ({min(times[k]):.3f})" for k in ("import", "initialize")]
        print(f"| {name} | {' | '.join(cells)} | {'imported' if compilers[name] else 'not imported'} |")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
