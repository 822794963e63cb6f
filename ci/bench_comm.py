"""Training over slow links: bytes on the wire, time of a step, and time to a validation loss, between hosts that are
joined by a slow link only.

    ci/bench comm [--hosts 2] [--ranks 1] [--rates 100mbit,1gbit] [--systems ddp,bf16,powersgd2,...] [--steps 3]
    ci/bench comm --loss [--train-steps 160] [--piece-s 240] [--rates 100mbit] [--systems ...]

Needs root, `ip` and `tc` (iproute2), `unshare` and `nsenter` (util-linux). The hosts: ci/slow_link/hosts.py. What
ranks do: ci/slow_link/training.py. All systems train the same model with the same batches, in fresh processes.
Results are kept in --folder, one file for each system, and are not measured again. With `--loss` a system trains for
--piece-s seconds at a time: call the command again until nothing is unfinished.

Payload: what the interface's counters say a host sent during the measured steps, less 66 bytes of headers (Ethernet,
IP, TCP with timestamps) for each packet. "Exchange" is the time of a step less that of forward and backward without any
communication, which is measured in the same process: on a machine with fewer cores than hosts, computing takes long.
"Floor": the payload divided by the rate of the link.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from slow_link.hosts import Host, hosts, missing, printed
from slow_link.training import LABELS

ROOT = Path(__file__).resolve().parent.parent
SYSTEMS = ("ddp", "bf16", "powersgd2", "powersgd4", "hook", "onebit", "zeroone")
LOSS_SYSTEMS = ("ddp", "bf16", "powersgd2", "powersgd4", "onebit16", "zeroone16", "local")
PORT = 29411
BAND = 1.01
"""A system has arrived when its validation loss is at most this times that of fp32 DDP at its end."""
BITS = {"mbit": 1e6, "gbit": 1e9}


def run(made: list[Host], what: str, system: str, options: argparse.Namespace, more: dict[str, Any]) -> Any:
    """Runs one system on all hosts, and returns what its first rank printed."""
    world = len(made) * options.ranks
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "ci"),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": made[0].address,
        "MASTER_PORT": str(PORT),
    }
    environ |= {"GLOO_SOCKET_IFNAME": "slow0", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    settings = {"local": options.ranks, "layers": options.layers, **more}
    own = [sys.executable, "-m", "slow_link.training", what, system, json.dumps(settings)]
    processes = [
        subprocess.Popen(
            made[rank // options.ranks].command(*own),
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank % options.ranks)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(world)
    ]
    return printed(processes, system, options.timeout)


def bytes_per_s(rate: str) -> float:
    """Of a rate as `tc` writes it: 100mbit, 1gbit."""
    return float(rate[:-4]) * BITS[rate[-4:]] / 8


# -- steps


def measure_steps(rate: str, options: argparse.Namespace) -> None:
    """Measures what has no result yet, and prints a table."""
    results = {}
    for system in options.systems.split(","):
        name = f"{system}-{options.hosts}x{options.ranks}-{rate}-{options.layers}-{options.steps}.json"
        kept = options.folder / name
        if not kept.exists():
            with hosts(options.hosts, rate) as made:
                kept.write_text(json.dumps(run(made, "steps", system, options, {"steps": options.steps})))
        results[system] = json.loads(kept.read_text())
    print(table(rate, results, options), end="\n\n", flush=True)


def table(rate: str, results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    """Markdown. Every rank of a host reads the same counters: the first one of each counts."""
    first = next(iter(results))
    numel = results[first][0]["numel"]
    rows = [
        f"{options.hosts} hosts, {options.ranks} ranks on each, {rate}, {numel / 1e6:.1f} M parameters",
        "",
    ]
    names = (
        "system",
        "payload per host and step",
        "of the first row",
        "against the formula",
        "floor",
        "step",
    )
    names += ("exchange", "times faster", "step, times faster")
    rows += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    dense = results[first]
    for system, ranks in results.items():
        payload, formula = (mean(ranks, key, options.ranks) for key in ("payload", "formula"))
        assert payload is not None
        base = mean(dense, "payload", options.ranks)
        assert base is not None
        cells = [
            LABELS[system],
            f"{payload / 1e6:.3f} MB",
            f"1/{base / payload:.1f}",
            "" if formula is None else f"{payload / formula - 1:+.1%}",
            f"{payload / bytes_per_s(rate):.2f} s",
            f"{step(ranks):.2f} s",
            f"{step(ranks) - alone(ranks):.2f} s",
            f"{(step(dense) - alone(dense)) / (step(ranks) - alone(ranks)):.1f}",
            f"{step(dense) / step(ranks):.1f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def mean(ranks: list[dict[str, Any]], key: str, local: int) -> float | None:
    """Over hosts."""
    values = [r[key] for r in ranks[::local]]
    return None if values[0] is None else sum(values) / len(values)


def step(ranks: list[dict[str, Any]]) -> float:
    """Seconds of a step."""
    return float(max(r["step_s"] for r in ranks))


def alone(ranks: list[dict[str, Any]]) -> float:
    """Seconds of forward and backward without communication."""
    return float(max(r["alone_s"] for r in ranks))


# -- loss


def measure_loss(rate: str, options: argparse.Namespace) -> None:
    """Trains one piece of every system that is not finished, and prints a table of what there is."""
    results = {}
    for system in options.systems.split(","):
        name = f"loss-{system}-{options.hosts}x{options.ranks}-{rate}-{options.layers}-{options.train_steps}"
        kept = options.folder / f"{name}.json"
        result = json.loads(kept.read_text()) if kept.exists() else None
        if result is None or result["step"] < result["total"]:
            more = {
                "train_steps": options.train_steps,
                "validate_every": max(1, options.train_steps // 10),
                "windows": options.windows,
                "piece_s": options.piece_s,
                "state": str(options.folder / name),
            }
            with hosts(options.hosts, rate) as made:
                result = run(made, "loss", system, options, more)
            kept.write_text(json.dumps(result))
        results[system] = result
        if result["step"] < result["total"]:
            print(
                f"{system}: unfinished, step {result['step']} of {result['total']}; run the command again",
                flush=True,
            )
            return
    print(loss_table(rate, results, options), end="\n\n", flush=True)


def loss_table(rate: str, results: dict[str, Any], options: argparse.Namespace) -> str:
    """Markdown."""
    first = next(iter(results))
    target = results[first]["curve"][-1][2] * BAND
    base = arrival(results[first]["curve"], target)
    assert base is not None
    rows = [f"{options.hosts} hosts, {rate}, {options.train_steps} steps; goal: loss {target:.4f}", ""]
    names = (
        "system",
        "validation loss",
        "against the first row",
        "median step",
        "whole run",
        "to the goal",
        "faster",
    )
    rows += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for system, result in results.items():
        loss, seconds = result["curve"][-1][2], arrival(result["curve"], target)
        times = sorted(result["times"])
        cells = [
            LABELS[system],
            f"{loss:.4f}",
            f"{loss / results[first]['curve'][-1][2] - 1:+.2%}",
            f"{times[len(times) // 2]:.2f} s",
            f"{result['seconds']:.0f} s",
            "not reached" if seconds is None else f"{seconds:.0f} s",
            "" if seconds is None else f"{base / seconds:.1f} x",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def arrival(curve: list[tuple[int, float, float]], target: float) -> float | None:
    """Seconds until the loss is at most `target`, between two validations on a straight line; None: it never is."""
    for (_, before, higher), (_, after, lower) in itertools.pairwise(curve):
        if lower <= target:
            return (
                before + (after - before) * (higher - target) / (higher - lower)
                if higher > target
                else before
            )
    return None


def main() -> None:
    """Parses arguments, measures, prints tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="on each host")
    parser.add_argument("--rates", default="100mbit,1gbit")
    parser.add_argument("--systems", help="default: those that data parallelism has")
    parser.add_argument("--steps", type=int, default=3, help="that are timed")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--loss", action="store_true", help="train, and print the time to a validation loss")
    parser.add_argument("--train-steps", type=int, default=160)
    parser.add_argument("--windows", type=int, default=64, help="of 64 bytes, for a validation")
    parser.add_argument("--piece-s", type=float, default=1e9, help="seconds of a piece of training")
    parser.add_argument("--timeout", type=float, default=3600.0)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench-comm")
    options = parser.parse_args()
    if missing():
        sys.exit(f"ci/bench comm: this machine lacks {', '.join(missing())}")
    options.systems = options.systems or ",".join(LOSS_SYSTEMS if options.loss else SYSTEMS)
    options.folder.mkdir(parents=True, exist_ok=True)
    for rate in options.rates.split(","):
        (measure_loss if options.loss else measure_steps)(rate, options)


if __name__ == "__main__":
    main()
