"""The predicted time of a step beside the real one, for a small GPT on two ranks.

    ci/bench plan                         # two ranks on this machine
    ci/bench plan --link 200mbit          # two hosts joined by a link of this rate (ci/slow_link/hosts.py; needs root)

Rates are measured in the processes that train, before every round of configurations, and the medians of all rounds
are compared: on a shared machine nothing else is comparable. Prints a JSON object at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from ds_engine.build.memory.plan import Planned
from ds_engine.build.step_time import work_of, workload
from ds_engine.build.step_time.calibrate import measured, rates_from
from ds_engine.config import load
from ds_engine.step_time import simulate
from slow_link.hosts import hosts, missing

BASE = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "startup_summary": False,
    "steps_per_print": 0,
}
TOKENS = 128


class Gpt(nn.Module):
    """Blocks of torch's own layers, and a loss."""

    def __init__(self, layers=4, dim=256):
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        block = {"batch_first": True, "dropout": 0.0, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, 4, 4 * dim, **block) for _ in range(layers)
        )
        self.head = nn.Linear(dim, 256)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), tokens.flatten())


def make():
    """The model, and inputs of one forward."""
    return Gpt(), torch.zeros(4, TOKENS, dtype=torch.long)


def configuration(micro, steps, stage):
    zero = {"zero_optimization": {"stage": stage}}
    return BASE | {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps} | zero


def rank(rounds, cases, steps):
    """What a rank measures: rates and step times of every round."""
    import ds_engine

    told = []
    for _ in range(rounds):
        rates = measured(configuration(4, 1, 0), f"{__file__}:make", None, 4)
        times = []
        for case in cases:
            torch.manual_seed(0)
            model, tokens = make()
            engine, *_ = ds_engine.initialize(model=model, config=configuration(*case))
            tokens = tokens[:1].repeat(case[0], 1)
            seconds = []
            for _ in range(steps + 1):
                start = time.perf_counter()
                for _ in range(case[1]):
                    engine.backward(engine(tokens))
                    engine.step()
                seconds.append(time.perf_counter() - start)
            engine.destroy()
            times.append(statistics.median(seconds[1:]))
        told.append((rates, times))
    return told


def results(options, cases):
    """The results of both ranks, on this machine or on two hosts."""
    arguments = (options.rounds, cases, options.steps)
    if options.link is None:
        from ds_engine.launch import notebook

        return notebook(rank, 2, *arguments)
    if missing():
        sys.exit(f"--link needs {', '.join(missing())}")
    with tempfile.TemporaryDirectory() as folder, hosts(2, options.link) as made:
        started = []
        for number, host in enumerate(made):
            out = Path(folder) / f"{number}.json"
            environment = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            environment |= {
                "MASTER_ADDR": made[0].address,
                "MASTER_PORT": "29577",
                "GLOO_SOCKET_IFNAME": "slow0",
            }
            command = host.command(
                sys.executable, __file__, "--rank", json.dumps(arguments), "--out", str(out)
            )
            started.append(
                (subprocess.Popen(command, env=os.environ | environment | {"OMP_NUM_THREADS": "1"}), out)
            )
        try:
            for process, _ in started:
                if process.wait(timeout=280):
                    sys.exit("a rank failed")
            return [json.loads(out.read_text()) for _, out in started]
        finally:
            for process, _ in started:
                process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--link", help="rate of the link between two hosts, for tc: 200mbit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps of each configuration in a round")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        Path(options.out).write_text(json.dumps(rank(*json.loads(options.rank))))
        return
    cases = list(itertools.product((2, 4), (1, 3), (0, 1, 2, 3)))
    told = results(options, cases)
    planned = Planned.of(load(configuration(4, 1, 0)), make, ranks=2, device="cpu")
    work = work_of(planned.model, planned.inputs, planned.samples)
    flops = work.flops(planned.samples)
    rates = [
        rates_from([one[number][0] for one in told], flops, load(BASE | {"train_batch_size": 8}))
        for number in range(options.rounds)
    ]
    errors, ranked = [], []
    print("micro-batch, accumulation, stage: real ms, predicted ms, error")
    for number, case in enumerate(cases):
        job = Planned.of(load(configuration(*case)), make, ranks=2, device="cpu")
        plan = job.memory()
        predicted = statistics.median(simulate(workload(job.job, plan, work), one).total_s for one in rates)
        real = statistics.median(max(one[turn][1][number] for one in told) for turn in range(options.rounds))
        errors.append(predicted / real - 1)
        ranked.append((real, predicted, case))
        print(f"{case}: {real * 1e3:.1f}, {predicted * 1e3:.1f}, {errors[-1]:+.1%}", flush=True)
    within = sum(abs(error) <= 0.10 for error in errors)
    mean = sum(map(abs, errors)) / len(errors)
    groups = [[row for row in ranked if row[2][:2] == key] for key in itertools.product((2, 4), (1, 3))]
    # The stage that the prediction ranks first: how much slower it is than the fastest.
    loss = [min(group, key=lambda r: r[1])[0] / min(group)[0] for group in groups]
    print(
        json.dumps(
            {
                "within 10 %": f"{within} of {len(errors)}",
                "mean error": round(mean, 4),
                "largest": round(max(map(abs, errors)), 4),
                "time of the first choice over the fastest stage": [round(x, 3) for x in loss],
                "rates": json.loads(rates[0].to_json()),
                "load": os.getloadavg()[0],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
