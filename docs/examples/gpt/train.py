"""Trains a byte-level language model on the sources of Python's standard library.

    ds run docs/examples/gpt/train.py --config docs/examples/gpt/ds_config.json

Only the public interfaces of ds_engine, ds_comm and ds_profiler are used. Stopped at any moment, by Ctrl-C or kill -9,
it continues from the last checkpoint when it is started again, and sees the same bytes as if it had never stopped. The
exit status is 1 when the model is not clearly better than a bigram model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import live
import runs
import torch
import torch.distributed as dist
from model import GPT
from torch import Tensor

import ds_comm
import ds_engine
from ds_profiler.report import write_report

MARGIN = 0.10
"""Nats per byte by which the model has to beat the bigram model."""
PROMPTS = ("def ", "class ", "import ")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. The defaults are the job of ci/train."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Train a byte-level language model with ds.")
    parser.add_argument("--config", type=Path, default=here / "ds_config.json", help="a ds_config.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpt"), help="where run directories go")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (default: total_num_steps of the schedule)"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=128, help="bytes that the model sees at once")
    parser.add_argument("--checkpoint-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--validate-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--validation-windows", type=int, default=512, help="for the last validation")
    parser.add_argument(
        "--sample-bytes", type=int, default=200, help="length of each sample from the trained model"
    )
    parser.add_argument(
        "--offload",
        choices=["none", "cpu", "nvme"],
        help="where masters, gradients and optimizer states are stored; nvme: also parameters (default: see --config)",
    )
    parser.add_argument(
        "--nvme-path", type=Path, help="folder on the disk for --offload nvme (default: that of --runs)"
    )
    parser.add_argument(
        "--state-dtype",
        choices=["fp32", "bf16", "int8"],
        help="format of the optimizer's states, with offload_optimizer (default: see --config)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the weights and of the order of the data")
    return parser.parse_args(argv)


def bf16_is_native() -> bool:
    """Whether this machine has instructions for bfloat16; without them it is slower than float32."""
    if torch.accelerator.is_available():
        return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="ascii", errors="replace").split() if cpuinfo.exists() else []
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def settings_for(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """(the configuration for this machine and these arguments, what was changed in the file's)."""
    config = json.loads(args.config.read_text(encoding="utf-8"))
    notes = []
    if config.get("bf16", {}).get("enabled") and not bf16_is_native():
        config["bf16"]["enabled"] = False
        notes.append("computing in float32: this CPU has no bfloat16 instructions (avx512_bf16, amx_bf16)")
    if args.offload is not None:
        _store_at(args.offload, args.nvme_path or args.runs, config["zero_optimization"])
        notes.append(f"offload_optimizer and offload_param: {args.offload}")
    if args.state_dtype is not None:
        config["optimizer"]["params"]["state_dtype"] = args.state_dtype
        notes.append(f"optimizer states in {args.state_dtype}")
    schedule = config["scheduler"]["params"]
    if args.steps is not None and args.steps != schedule["total_num_steps"]:
        schedule["warmup_num_steps"] = min(schedule["warmup_num_steps"], max(2, args.steps // 10))
        schedule["total_num_steps"] = args.steps
    return config, notes


def _store_at(device: str, folder: Path, zero: dict[str, Any]) -> None:
    """Sets where `zero_optimization` stores the state."""
    place: dict[str, Any] = {"device": device}
    if device == "nvme":
        folder.mkdir(parents=True, exist_ok=True)
        place["nvme_path"] = str(folder)
    zero["offload_optimizer"] = place
    zero["offload_param"] = place if device == "nvme" else {"device": "none"}


@dataclass(kw_only=True)
class Job:
    """What the functions below share: the engine and the data, and where this rank stands."""

    args: argparse.Namespace
    engine: ds_engine.Engine
    corpus: data.Corpus
    total_steps: int
    device: torch.device
    rank: int
    ranks: int
    stop: ds_comm.StopRequest

    def mean(self, *values: Tensor | float) -> list[float]:
        """Means over all ranks."""
        total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(total)
        return [value / self.ranks for value in total.tolist()]


def train_step(job: Job) -> tuple[float, bool]:
    """One optimizer step: (mean loss over its micro-batches and the ranks, whether any rank was asked to stop)."""
    engine, args = job.engine, job.args
    accumulation, size = engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()
    losses = []
    for micro in range(accumulation):
        # Numbered over steps, accumulation and ranks: no state to save, and the same bytes after a restart.
        index = (engine.global_steps * accumulation + micro) * job.ranks + job.rank
        inputs, targets = data.train_batch(
            job.corpus.train, seed=args.seed, index=index, size=size, length=args.context
        )
        if micro == accumulation - 1:
            assert engine.is_gradient_accumulation_boundary()
        loss = engine(inputs.to(job.device), targets.to(job.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    # A signal reaches the ranks at different times. Together with the loss, without a message of its own, all of them
    # learn of it after the same step; `job.stop.agreed()` would be the simple way.
    loss, stop = job.mean(torch.stack(losses).mean(), job.stop.noted)
    return loss, stop > 0


def validation_windows(job: Job, count: int) -> tuple[Tensor, Tensor]:
    """About `count` windows, the same number for every rank, since all of them have to run the forward together."""
    count = max(1, count // job.ranks) * job.ranks
    return data.validation_windows(job.corpus.validation, count=count, length=job.args.context)


@torch.no_grad()
def validate(job: Job, count: int) -> float:
    """Loss on about `count` windows of held-out files, in nats per byte."""
    inputs, targets = (part.chunk(job.ranks)[job.rank] for part in validation_windows(job, count))
    losses = [
        job.engine(x.to(job.device), y.to(job.device)) * len(x)
        for x, y in zip(inputs.split(16), targets.split(16), strict=True)
    ]
    return job.mean(torch.stack(losses).sum() / len(inputs))[0]


@torch.no_grad()
def sample(job: Job) -> str:
    """Text from the model, one continuation for each prompt.

    All ranks draw the same bytes, because in stage 3 they have to run the forward together.
    """
    generator = torch.Generator().manual_seed(job.args.seed)
    width = max(len(p) for p in PROMPTS)
    text = torch.tensor([list(p.rjust(width, "\n").encode()) for p in PROMPTS])
    for _ in range(job.args.sample_bytes):
        scores = job.engine(text[:, -job.args.context :].to(job.device))[:, -1].float().cpu()
        text = torch.cat((text, torch.multinomial((scores / 0.7).softmax(-1), 1, generator=generator)), dim=1)
    rows = [bytes(row).decode("utf-8", errors="replace").strip("\n\0") for row in text.tolist()]
    return ("\n\n" + "-" * 40 + "\n\n").join(row.replace("\0", "\n") for row in rows) + "\n"


def train(job: Job, run: Path) -> Iterator[dict[str, Any]]:
    """Trains from where the engine stands to the end or a request to stop, saving now and then.

    Yields one row of the log per step.
    """
    engine, args = job.engine, job.args
    tokens = engine.train_batch_size() * args.context
    while engine.global_steps < job.total_steps:
        start = time.perf_counter()
        loss, stop = train_step(job)
        seconds = time.perf_counter() - start
        step = engine.global_steps
        row: dict[str, Any] = {"step": step, "loss": loss, "lr": engine.get_lr()[0]}
        row |= {"grad_norm": engine.get_global_grad_norm(), "tokens_per_s": tokens / seconds}
        row["memory_bytes"] = live.memory_bytes()
        last = step == job.total_steps
        if step % args.validate_every == 0 and not (last or stop):
            row["validation"] = validate(job, args.validation_windows // 8)
        if step % args.checkpoint_every == 0 or last or stop:
            engine.save_checkpoint(run / "checkpoints", client_state={"run": run.name})
        yield row
        if stop:
            return


def resume(job: Job, run: Path, progress: live.Live) -> None:
    """Loads the newest complete checkpoint, if there is one, and says so."""
    checkpoints = run / "checkpoints"
    if ds_engine.checkpoint.latest(checkpoints) is None:
        progress.say(f"run {run}: starting at step 1 of {job.total_steps}")
        return
    path, _ = job.engine.load_checkpoint(checkpoints)
    progress.say(
        f"run {run}: continuing after step {job.engine.global_steps} of {job.total_steps}, from {Path(path).name}"
    )


def finish(job: Job, run: Path, progress: live.Live) -> bool:
    """Last validation, sample, page and verdict; whether the model is good enough."""
    loss = validate(job, job.args.validation_windows)
    bigram = data.Bigram(job.corpus.train).loss(*validation_windows(job, job.args.validation_windows))
    text = sample(job)
    passed = loss <= bigram - MARGIN
    if job.rank == 0:
        facts = {
            "validation loss": f"{loss:.4f} nats/byte",
            "bigram model": f"{bigram:.4f} nats/byte",
            "better by": f"{bigram - loss:.4f} nats/byte (needed: {MARGIN:.2f})",
        }
        (run / "sample.txt").write_text(text, encoding="utf-8")
        runs.add_to_record(run, facts=facts, levels={"bigram": bigram}, texts={"Sample": text})
        log = runs.Log(run / "log.jsonl", first_step=job.total_steps + 1)
        log.write(step=job.total_steps, validation=loss)
        log.close()
        write_report(run)
        result = {"validation": loss, "bigram": bigram, "passed": passed, "steps": job.total_steps}
        runs.write_atomic(run / "result.json", json.dumps(result) + "\n")
    progress.say("")
    progress.say(text)
    progress.say(f"bigram model:    {bigram:.4f} nats/byte on the same validation bytes")
    progress.say(
        f"validation loss: {loss:.4f} nats/byte, {bigram - loss:.4f} below it (needed: {MARGIN:.2f})"
    )
    progress.say(f"curves: {run / 'report.html'}   sample: {run / 'sample.txt'}")
    progress.say("passed" if passed else "FAILED: the model is not clearly better than the bigram model")
    return passed


def prepare(args: argparse.Namespace) -> tuple[Job, Path, list[str]]:
    """Engine, data and run directory."""
    config, notes = settings_for(args)
    torch.manual_seed(args.seed)
    model = GPT(args.layers, args.dim, args.heads)
    engine, _, _, _ = ds_engine.initialize(model=model, config=config)
    world = engine.world
    # Rank 0 decides which directory, or one rank might see what another has just made.
    identity = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "runs"}
    chosen = [runs.choose(args.runs, identity | {"config": config}) if world.rank == 0 else None]
    if world.world_size > 1:
        dist.broadcast_object_list(chosen, src=0, device=world.device)
    run = chosen[0]
    assert run is not None
    corpus = data.load()
    total_steps = config["scheduler"]["params"]["total_num_steps"]
    job = Job(
        args=args,
        engine=engine,
        corpus=corpus,
        total_steps=total_steps,
        device=world.device,
        rank=world.rank,
        ranks=world.world_size,
        stop=ds_comm.StopRequest(),
    )
    size = sum(p.numel() for p in model.parameters())
    notes.append(
        f"{size / 1e6:.1f} million parameters; {len(corpus.train) / 1e6:.1f} MB of train and "
        f"{len(corpus.validation) / 1e6:.1f} MB of validation text from {corpus.num_files} files"
    )
    if world.rank == 0:
        tokens = engine.train_batch_size() * args.context
        facts = {
            "model": f"{args.layers} layers of {args.dim}, {size:,} parameters",
            "text": f"{len(corpus.train):,} bytes for training, {len(corpus.validation):,} for validation",
            "steps": f"{total_steps} of {tokens:,} bytes",
            "ranks": f"{world.world_size} on {world.device.type}, torch {torch.__version__}",
        }
        title = f"Language model on Python's sources, run {run.name}"
        runs.note_start(run, {"title": title, "facts": facts, "configuration": config})
    return job, run, notes


def main() -> int:
    """0 when the model beats the bigram model by MARGIN, 1 when it does not, 130 when the job was stopped."""
    job, run, notes = prepare(arguments())
    progress = live.Live(total_steps=job.total_steps, done_steps=0, enabled=job.rank == 0)
    for note in notes:
        progress.say(note)
    resume(job, run, progress)
    log = runs.Log(run / "log.jsonl", first_step=job.engine.global_steps + 1) if job.rank == 0 else None
    with job.stop, progress:
        for row in train(job, run):
            if log is not None:
                log.write(**row)
            progress.step(row)
    if log is not None:
        log.close()
    if job.engine.global_steps < job.total_steps:
        progress.say(f"stopped and saved after step {job.engine.global_steps}: start it again to continue")
        return leave(130)
    passed = finish(job, run, progress)
    # One rank is enough to fail the job, and the launcher then shows one failure.
    return leave(0 if passed or job.rank != 0 else 1)


def leave(status: int) -> int:
    """Takes leave of the other ranks; nobody goes before rank 0 has written everything."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
