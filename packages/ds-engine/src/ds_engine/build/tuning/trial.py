"""One trial: trains a few steps with one configuration, in the ranks of a job of its own.

`python -m ds_engine.build.tuning.trial SPEC` is what each rank runs; `run_trial` starts the job and reads its result.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import ds_comm
from ds_engine.device import synchronize
from ds_engine.files import write_whole
from ds_engine.training.trial import what_ran
from ds_engine.tune import Candidate, Outcome
from ds_engine.tune.process import OUT_OF_MEMORY, run_quietly
from ds_zero.predict.plan import default_loss


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a trial runs."""

    config: Mapping[str, Any]
    model: str
    """As `ds plan --model`."""
    tokens: int | None
    recompute: bool
    arguments: Mapping[str, int]
    """Of the function that makes the model."""
    warm_up: int
    """Steps before those that are measured."""
    steps: int
    out: str
    """File for the result of rank 0."""


def run_trial(candidate: Candidate, spec: Spec, *, ranks: int, timeout_s: float) -> Outcome:
    """Starts the ranks, waits for them, and returns what they have measured. A trial that fails or takes too long is an
    outcome, too.
    """
    out = Path(spec.out)
    out.unlink(missing_ok=True)
    file = out.with_suffix(".spec.json")
    write_whole(file, json.dumps(asdict(spec)).encode())
    command = [sys.executable, "-m", "ds_engine", "run", "-n", str(ranks), "-m", __name__, str(file)]
    log = out.with_suffix(".txt")
    reason = run_quietly(command, log, timeout_s)
    file.unlink(missing_ok=True)
    if not reason and out.is_file():
        told = json.loads(out.read_text(encoding="utf-8"))
        out.unlink()
        return Outcome(candidate=candidate, samples_per_s=told["samples_per_s"], ran=told["ran"])
    return Outcome(
        candidate=candidate,
        samples_per_s=None,
        reason=reason or f"no result: see {log}",
        out_of_memory=reason == OUT_OF_MEMORY,
    )


def train(spec: Spec) -> dict[str, Any]:
    """Trains on this rank. Returns throughput of all ranks, and what was really in effect."""
    from ds_engine.assemble import initialize
    from ds_engine.build.memory.model_source import model_factory
    from ds_zero.predict.simulate import checkpoint_units

    ds_comm.start()  # layers of experts, and pipelines, ask for the ranks while they are made
    torch.manual_seed(0)
    made = model_factory(spec.model, tokens=spec.tokens, arguments=spec.arguments)()
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if inputs is None:
        raise ValueError(f"{spec.model!r} gives no example inputs: return (model, inputs)")
    if spec.recompute:
        checkpoint_units(model)
    engine, *_ = initialize(model, {**spec.config, "startup_summary": False, "steps_per_print": 0})
    run = _step_of(engine, model, inputs)
    seconds = []
    for number in range(spec.warm_up + spec.steps):
        synchronize(engine.world.device)
        start = time.perf_counter()
        run()
        synchronize(engine.world.device)
        if number >= spec.warm_up:
            seconds.append(time.perf_counter() - start)
    # Ranks wait for each other, so the median of the slowest is that of all.
    step_s = torch.tensor(statistics.median(seconds), dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(step_s, dist.ReduceOp.MAX)
    ran = what_ran(engine.job, engine.world) | {"recompute": spec.recompute, "step_s": step_s.item()}
    told = {"samples_per_s": engine.batch.train / step_s.item(), "ran": ran}
    engine.destroy()
    return told


def _step_of(engine: Any, model: nn.Module, inputs: Any) -> Callable[[], None]:
    """Returns a function that runs one optimizer step."""
    from ds_engine.build.layers.tensor import divide_sequences
    from ds_engine.build.memory.model_axes import divided
    from ds_engine.build.step_time.calibrate import resized
    from ds_engine.build.step_time.work import call

    micro, accumulation, device = engine.batch.micro, engine.batch.steps, engine.world.device
    batch = tree_map_only(Tensor, lambda t: resized(t, micro).to(device), inputs)
    if engine.topology.pipe.size > 1:
        data = [batch] * accumulation

        def through_stages() -> None:
            engine.train_batch(data)

        return through_stages
    if engine.topology.sequence.size > 1:
        divide_sequences(model, engine.roles.sequence_group)
        batch = _own_positions(divided(batch, engine.job, model), engine)

    def step() -> None:
        for _ in range(accumulation):
            engine.backward(default_loss(call(engine, batch)))
            engine.step()

    return step


def _own_positions(batch: Any, engine: Any) -> Any:
    """Returns the batch with the positions of this rank's tokens, which ranks of a sequence must not share."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return batch
    rows, tokens = batch["input_ids"].shape
    begin = engine.topology.sequence.index * tokens
    positions = torch.arange(begin, begin + tokens, device=batch["input_ids"].device)
    return {**batch, "position_ids": positions.expand(rows, -1)}


def main() -> None:
    """What a rank runs."""
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    told = train(spec)
    if os.environ.get("RANK", "0") == "0":
        write_whole(Path(spec.out), json.dumps(told).encode())
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
