"""One pipeline step of ds-pipe, DeepSpeed and torch.distributed.pipelining, side by side in one run.

ci/bench pipe_step [--rounds N] [--dim D] [--batch B] [--length T]

Two stages that compute, on two ranks with one thread each; the same model with the same weights, the same
micro-batches, schedule 1F1B, the same SGD. In each round all contenders run a few steps, in turn. "floor" is the time
that the slower stage needs for forwards and backwards of its micro-batches while the other one computes too, times
(m + p - 1)/m for the bubble of the schedule; "overhead" is a step less the floor. The fastest round of each counts,
because a busy machine only adds time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from ds_pipe.model import LayerSpec, Pipeline, PipelineModule
from workloads.sleeping_stages import on_ranks

VOCAB = 256
Step = Callable[[], float]


class Embedding(nn.Module):
    """Tokens to vectors. Every layer draws its weights from a seed of its own, so that all contenders have the same."""

    def __init__(self, seed: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Embedding(VOCAB, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embeds."""
        result: Tensor = self.inner(x)
        return result


class Block(nn.Module):
    """A block of attention and two linear layers."""

    def __init__(self, seed: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.TransformerEncoderLayer(
            dim, 8, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        """Computes the block."""
        result: Tensor = self.inner(x)
        return result


class Head(nn.Module):
    """Vectors to logits."""

    def __init__(self, seed: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.inner = nn.LayerNorm(dim), nn.Linear(dim, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        """Computes logits."""
        result: Tensor = self.inner(self.norm(x))
        return result


def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def kinds(args: argparse.Namespace) -> list[tuple[type[nn.Module], int, int]]:
    """Class and arguments of every layer; an even number."""
    classes = [Embedding, *[Block] * args.layers, Head]
    return [(kind, seed, args.dim) for seed, kind in enumerate(classes)]


def own_layers(args: argparse.Namespace) -> nn.Sequential:
    """The layers of this rank's stage."""
    every = kinds(args)
    half = len(every) // 2
    mine = every[:half] if dist.get_rank() == 0 else every[half:]
    return nn.Sequential(*(kind(seed, dim) for kind, seed, dim in mine))


def batches(args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of every step."""
    generator = torch.Generator().manual_seed(1)
    tokens = [
        torch.randint(VOCAB, (args.batch, args.length + 1), generator=generator)
        for _ in range(args.micro_batches)
    ]
    return [(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]


def ours(args: argparse.Namespace) -> Step:
    """ds-pipe in a plain loop."""
    half = len(kinds(args)) // 2
    specs = [LayerSpec(kind, seed, dim) for kind, seed, dim in kinds(args)]
    module = PipelineModule(specs, 2, loss_fn=loss_fn, partition_method=[0, half, 2 * half], schedule="1f1b")
    pipeline = Pipeline(module, args.micro_batches)
    optimizer = torch.optim.SGD(module.parameters(), lr=args.lr)
    data = batches(args)

    def step() -> float:
        loss = pipeline.forward_backward(data)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def of_torch(args: argparse.Namespace) -> Step:
    """torch.distributed.pipelining."""
    rank, module = dist.get_rank(), own_layers(args)
    stage = PipelineStage(module, rank, 2, torch.device("cpu"), group=dist.new_group())
    schedule = Schedule1F1B(stage, args.micro_batches, loss_fn=loss_fn)
    optimizer = torch.optim.SGD(module.parameters(), lr=args.lr)
    inputs, labels = (torch.cat(parts) for parts in zip(*batches(args), strict=True))

    def step() -> float:
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=labels, losses=losses)
        # As the others do: the same loss on all ranks.
        mean = torch.stack(losses).mean().detach() if losses else torch.zeros(())
        dist.broadcast(mean, 1)
        optimizer.step()
        optimizer.zero_grad()
        return mean.item()

    return step


def of_deepspeed(args: argparse.Namespace) -> Step:
    """DeepSpeed's PipelineEngine."""
    import deepspeed

    if "+ds" in deepspeed.__version__:
        raise SystemExit("deepspeed is ds-compat here: run through ci/bench")
    from deepspeed.pipe import LayerSpec as TheirSpec
    from deepspeed.pipe import PipelineModule as TheirModule

    # It would compile collectives over shared memory, which pipelines do not use.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    specs = [TheirSpec(kind, seed, dim) for kind, seed, dim in kinds(args)]
    module = TheirModule(specs, num_stages=2, loss_fn=loss_fn, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": args.micro_batches,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.SGD(module.parameters(), lr=args.lr), config=config
    )
    data = batches(args)

    def forever() -> Iterator[Any]:
        while True:
            yield from data

    iterator = forever()
    return lambda: float(engine.train_batch(iterator))


def floor(args: argparse.Namespace) -> Step:
    """The stage alone: forwards and backwards of its micro-batches, without messages."""
    module, data = own_layers(args), batches(args)
    x = torch.randn(args.batch, args.length, args.dim, requires_grad=True)
    ahead = torch.randn(args.batch, args.length, args.dim)

    def step() -> float:
        for inputs, labels in data:
            if dist.get_rank() == 0:
                module(inputs).backward(ahead)
            else:
                (loss_fn(module(x), labels) / args.micro_batches).backward()
        module.zero_grad()
        return 0.0

    return step


def body(rank: int, ranks: int, args: argparse.Namespace) -> None:
    """One rank."""
    contenders = {"ds-pipe": ours, "DeepSpeed": of_deepspeed, "torch": of_torch, "floor": floor}
    steps = {name: make(args) for name, make in contenders.items()}
    losses = {name: [round(step(), 4) for _ in range(3)] for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds):
        names = [*steps]
        for name in names[number % 4 :] + names[: number % 4]:  # nobody always comes after the same one
            dist.barrier()
            start = time.perf_counter()
            for _ in range(args.steps):
                steps[name]()
            spent = torch.tensor((time.perf_counter() - start) / args.steps)
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            seconds[name].append(spent.item())
    if rank == 0:
        show(seconds, losses, args)
    dist.barrier()
    os._exit(0)


def show(seconds: dict[str, list[float]], losses: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Prints the table."""
    import deepspeed

    same = losses["ds-pipe"] == losses["torch"] == losses["DeepSpeed"]
    print(f"2 stages, {args.layers} blocks of width {args.dim}, {args.micro_batches} micro-batches of {args.batch} x "
          f"{args.length}; best of {args.rounds} rounds of {args.steps} steps; torch {torch.__version__}, DeepSpeed "
          f"{deepspeed.__version__}; losses of the first steps {losses['ds-pipe']}, "
          f"{'the same for all' if same else losses}")  # fmt: skip
    best = {name: 1e3 * min(values) for name, values in seconds.items()}
    floor_ms = best.pop("floor") * (args.micro_batches + 1) / args.micro_batches
    print("| | step (ms) | beside ds-pipe's | overhead (ms) | beside ds-pipe's |\n|---|---|---|---|---|")
    print(f"| floor | {floor_ms:.1f} | | | |")
    own = best["ds-pipe"]
    for name, step_ms in best.items():
        print(
            f"| {name} | {step_ms:.1f} | {step_ms / own:.3f}x | {step_ms - floor_ms:.1f} "
            f"| {(step_ms - floor_ms) / (own - floor_ms):.2f}x |"
        )


def main() -> None:
    """Starts the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    on_ranks(2, body, parser.parse_args())


if __name__ == "__main__":
    main()
