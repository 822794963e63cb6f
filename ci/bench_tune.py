"""The search of `ds tune` beside trying everything: five small jobs on two ranks of this machine.

    ci/bench tune
    ci/bench tune --jobs gpt,wide --rounds 1

Every candidate of a job is trained for some steps, in turn, in the same two processes; the median of all rounds is its
throughput. The search then chooses by its predictions, made of rates that were measured in the same processes, and its
trials are the measurements of the first round. Prints the throughput of what it has found over that of the best, and
how many trials it took. A JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from torch import nn

import ds_moe
from bench_plan import TOKENS, Gpt
from ds_engine.build.memory.plan import Planned
from ds_engine.build.step_time import work_of
from ds_engine.build.step_time.calibrate import measured, rates_from
from ds_engine.build.tuning.tuner import Request, predict
from ds_engine.config import load
from ds_engine.tune import Candidate, Outcome, Search, Space, candidates

RANKS = 2
BASE = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}, "gradient_clipping": 1.0}


class Experts(nn.Module):
    """A layer with experts, and a loss."""

    def __init__(self, ep_size):
        super().__init__()
        self.up = nn.Linear(128, 128)
        self.moe = ds_moe.MoE(128, lambda: ds_moe.FeedForward(128, 512), 8, ep_size, k=1, use_rts=False)

    def forward(self, x):
        return self.moe(self.up(x))[0].square().mean()


def make_gpt():
    return Gpt(layers=3, dim=192), torch.zeros(4, TOKENS, dtype=torch.long)


def make_long():
    return Gpt(layers=6, dim=96), torch.zeros(4, TOKENS, dtype=torch.long)


def make_wide():
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))), torch.zeros(4, 1024)


def make_deep():
    layers = [part for _ in range(24) for part in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(*layers), torch.zeros(4, 128)


def make_experts(ep_size=1):
    return Experts(ep_size), torch.zeros(4, 32, 128)


STAGES = {"stages": (0, 1, 2, 3)}
JOBS = {
    "gpt": Space(ranks=RANKS, train_batch=16, **STAGES),
    "long": Space(ranks=RANKS, train_batch=None, max_micro=4, **STAGES),
    "wide": Space(ranks=RANKS, train_batch=32, stages=(0, 2), min_micro=4, buckets=(1 << 17, 1 << 23)),
    "deep": Space(ranks=RANKS, train_batch=None, max_micro=16, min_micro=4, **STAGES),
    "experts": Space(ranks=RANKS, train_batch=16, min_micro=2, stages=(0, 2), experts=(1, 2)),
}


def rank(name, rounds, steps):
    """What a rank measures: rates, and seconds of a step of every candidate and round."""
    rates = measured(BASE | {"train_batch_size": 8}, f"{__file__}:make_{name}", None, 4)
    return rates, [
        [seconds_of(candidate, name, steps) for candidate in candidates(JOBS[name])] for _ in range(rounds)
    ]


def seconds_of(candidate, name, steps):
    import ds_engine

    torch.manual_seed(0)
    model, inputs = globals()[f"make_{name}"](**candidate.arguments())
    quiet = {"startup_summary": False, "steps_per_print": 0}
    engine, *_ = ds_engine.initialize(model=model, config=candidate.config(BASE) | quiet)
    batch = inputs[:1].repeat(candidate.micro, *(1 for _ in inputs.shape[1:]))
    taken = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        for _ in range(candidate.steps):
            out = engine(batch)
            engine.backward(out if out.ndim == 0 else out.square().mean())
            engine.step()
        taken.append(time.perf_counter() - start)
    engine.destroy()
    return statistics.median(taken[2:])


def tuned(name, told):
    """The search over one job. Returns (throughput over that of the best, trials, choice, best)."""
    space = JOBS[name]
    every = candidates(space)
    settings = load(BASE | {"train_batch_size": 8})
    make = globals()[f"make_{name}"]
    planned = Planned.of(settings, make, ranks=RANKS, micro_batch=4, device="cpu")
    flops = work_of(planned.model, planned.inputs, 4).flops(4)
    rates = rates_from([rates for rates, _ in told], flops, settings)
    request = Request(base=BASE, model=f"{__file__}:make_{name}", space=space)
    predictions = predict(request, rates, 1 << 34)

    def throughput(candidate, turns):
        # The slowest rank is the one that the others wait for.
        number = every.index(candidate)
        seconds = statistics.median(max(one[turn][number] for _, one in told) for turn in turns)
        return candidate.micro * candidate.steps * RANKS / seconds

    def trial(candidate: Candidate) -> Outcome:
        return Outcome(candidate=candidate, samples_per_s=throughput(candidate, [0]))

    result = Search(predictions).run(trial, trials=5)
    rounds = range(len(told[0][1]))
    best = max(every, key=lambda candidate: throughput(candidate, rounds))
    chosen = result.best.candidate
    return {
        "candidates": len(every),
        "trials": len(result.outcomes),
        "of the best": round(throughput(chosen, rounds) / throughput(best, rounds), 3),
        "chosen": str(chosen),
        "best": str(best),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", default=",".join(JOBS), help="some of " + ", ".join(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of each candidate in a round")
    options = parser.parse_args()
    from ds_engine.launch import notebook

    results = {}
    for name in options.jobs.split(","):
        told = notebook(rank, RANKS, name, options.rounds, options.steps)
        results[name] = tuned(name, told)
        print(f"{name}: {results[name]}", flush=True)
    reached = sum(one["of the best"] >= 0.97 for one in results.values())
    print(
        json.dumps(
            {"0.97 reached": f"{reached} of {len(results)}", "load": os.getloadavg()[0]} | results, indent=1
        )
    )


if __name__ == "__main__":
    main()
