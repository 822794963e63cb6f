"""The same scripts and configurations under DeepSpeed and under ds-compat: do they train the same?

    ci/bench compat [--steps 20] [--jobs plain,accelerated,trainer] [--models gpt2] [--bf16]

Every job runs on two processes, once with the interpreter of .venv-peer (DeepSpeed, Accelerate, Transformers) and
once with that of .venv (ours, the same Accelerate and Transformers): the only thing that differs is which package
answers `import deepspeed`. What is compared are the losses of rank 0 at every micro-batch (of the Trainer: every step).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JOBS = ROOT / "tests" / "compat" / "jobs"


def run(python: str, job: str, out: Path, options: list[str], timeout_s: float) -> dict:
    """What the job writes."""
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = (
        f"{Path(python).parent}{os.pathsep}{environment['PATH']}"  # DeepSpeed looks for ninja
    )
    done = subprocess.run(
        [*command, str(JOBS / f"{job}.py"), f"--out={out}", *options],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(
            f"{python} {job} {' '.join(options)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(out.read_text())


def deviation(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference; inf for curves of different length."""
    if len(ours) != len(theirs):
        return float("inf")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", default=str(ROOT / ".venv-peer" / "bin" / "python"))
    parser.add_argument("--ours", default=str(ROOT / ".venv" / "bin" / "python"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", default="plain,accelerated,trainer")
    parser.add_argument("--models", default="gpt2")
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--accumulations", default="1,4")
    parser.add_argument(
        "--bf16", action="store_true", help="and the largest deviation between the peer's own stages"
    )
    parser.add_argument("--timeout-s", type=float, default=300)
    args = parser.parse_args()
    limit = None if args.bf16 else 1e-5
    print("| job | model | accumulation | stage | largest relative difference of a loss | s here | s there |")
    print("|---|---|---|---|---|---|---|")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for job in args.jobs.split(","):
            for model in args.models.split(","):
                for accumulation in args.accumulations.split(","):
                    peers: list[list[float]] = []
                    for stage in args.stages.split(","):
                        options = [f"--model={model}", f"--stage={stage}", f"--accumulation={accumulation}"]
                        options += [f"--steps={args.steps}", *(["--bf16"] if args.bf16 else [])]
                        found, seconds = [], []
                        for python in (args.ours, args.peer):
                            start = time.perf_counter()
                            out = Path(folder) / f"{len(list(Path(folder).iterdir()))}.json"
                            found.append(run(python, job, out, options, args.timeout_s)["losses"])
                            seconds.append(time.perf_counter() - start)
                        peers.append(found[1])
                        off = deviation(*found)
                        worst = max(worst, off)
                        row = [job, model, accumulation, stage, f"{off:.1e}", *(f"{s:.0f}" for s in seconds)]
                        print(f"| {' | '.join(row)} |", flush=True)
                    if args.bf16:
                        among = max(deviation(a, b) for a in peers for b in peers)
                        what = "the peer's stages among each other"
                        print(f"| {job} | {model} | {accumulation} | {what} | {among:.1e} | | |")
    print(f"\nlargest: {worst:.1e}" + (f" (wanted: at most {limit:.0e})" if limit else ""))
    return int(limit is not None and worst > limit)


if __name__ == "__main__":
    sys.exit(main())
