"""Experts that are divided among hosts beside ZeRO-3 of the same model, which gathers them, over a slow link.

    ci/bench moe --no-peer --wire
    PYTHONPATH=ci python -m slow_link.compare_experts [--hosts 2] [--rate 100mbit] [--steps 3] [--tokens 512]
                                                      [--layers 2] [--experts 8] [--hidden 256]

Needs what `ci/bench comm` needs; the hosts: ci/slow_link/hosts.py. All systems train the same model with the same
batches, one after the other. Payload: what a host's interface counts in a step, less the headers of packets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from slow_link.experts import LABELS
from slow_link.hosts import Host, hosts, missing, printed

ROOT = Path(__file__).resolve().parents[2]


def run(made: list[Host], system: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one system with a rank on each host, and returns what the first rank printed."""
    settings = {name: getattr(options, name) for name in ("hidden", "layers", "experts", "tokens", "steps")}
    environ = {
        **os.environ,
        "WORLD_SIZE": str(len(made)),
        "MASTER_ADDR": made[0].address,
        "MASTER_PORT": "29413",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GLOO_SOCKET_IFNAME": "slow0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "ci"),
    }
    command = [sys.executable, "-m", "slow_link.experts", system, json.dumps(settings)]
    processes = [
        subprocess.Popen(
            host.command(*command),
            env={**environ, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank, host in enumerate(made)
    ]
    result: dict[str, Any] = printed(processes, system, options.timeout)
    return result


def main(arguments: list[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (
        ("hosts", 2),
        ("steps", 3),
        ("tokens", 512),
        ("layers", 2),
        ("experts", 8),
        ("hidden", 256),
        ("timeout", 240),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", default="100mbit")
    options = parser.parse_args(arguments)
    if missing():
        raise SystemExit(f"this machine lacks {', '.join(missing())}")
    with hosts(options.hosts, options.rate) as made:
        results = {system: run(made, system, options) for system in LABELS}
    first = results["zero3"]
    numel = f"{first['numel'] / 1e6:.1f} M parameters"
    print(f"{options.hosts} hosts, {options.rate}, {numel}, {options.tokens} tokens a rank")
    print("\n| | step | payload of a host | faster | loss |\n|---|---|---|---|---|")
    for system, result in results.items():
        print(
            f"| {LABELS[system]} | {result['seconds']:.2f} s | {result['payload'] / 1e6:.2f} MB "
            f"| {first['seconds'] / result['seconds']:.1f} x | {result['loss']:.6f} |"
        )


if __name__ == "__main__":
    main()
