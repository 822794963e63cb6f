"""CPU optimizers against DeepSpeed's CPUAdam, torch's fused AdamW, and loops with the same memory traffic.  Run it with
`ci/bench adam [--write]`.

Rounds are interleaved: in each, every contender steps in turn, from a rotating start. A contender's time is the 20th
percentile of its rounds (interference only adds time); a ratio is the peer's time over ours, above 1 where we are
faster. Three runs, each on memory allocated anew; the median counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

from ds_core import arena, formats, kernels, optim

Steps = dict[str, Callable[[], None]]
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01
LOSS_SCALE, CLIP = 1024.0, 1.0


@dataclass(frozen=True)
class Goal:
    """What one ratio has to reach."""

    peer: str
    at_least: float


@dataclass(frozen=True)
class Section:
    """One table: contenders, and the goals of ours against them."""

    title: str
    make: Callable[[int], Steps]
    goals: dict[int, tuple[Goal, ...]]


def fill(x: Tensor, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of ordinary magnitude: no denormals, whatever the buffer held."""
    block = torch.randn(1 << 16, generator=torch.Generator().manual_seed(seed)) * scale
    flat = x.view(-1)
    for begin in range(0, flat.numel(), block.numel()):
        part = flat[begin : begin + block.numel()]
        part.copy_(block[: part.numel()])
    return x


def traffic(n: int, make: Callable[[int], Tensor], num_states: int = 2) -> Callable[[], None]:
    """The loop with the memory traffic of an fp32 step with 1 or 2 states, and no arithmetic."""
    library = ctypes.CDLL(os.environ["DS_BENCH_LIBRARY"])
    loop = library.ds_bench_read4_write3 if num_states == 2 else library.ds_bench_read3_write2
    buffers = [fill(make(n), seed) for seed in range(2 + num_states)]
    pointers = [ctypes.c_void_p(b.data_ptr()) for b in buffers]

    def step(keep: list[Tensor] = buffers) -> None:
        loop(*pointers, ctypes.c_int64(n), ctypes.c_int(torch.get_num_threads()))

    return step


def huge_pages() -> str:
    """How much of this process's memory lies on huge pages just now: says whether the arena got what it asked for."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    gib = {name: int(fields[name].split()[0]) / 2**20 for name in ("AnonHugePages", "Rss")}
    return f"{gib['AnonHugePages']:.1f} of {gib['Rss']:.1f} GiB on huge pages"


def parameter(data: Tensor, grad: Tensor) -> nn.Parameter:
    p = nn.Parameter(data)
    p.grad = grad
    return p


def own_memory(n: int) -> Steps:
    """Each optimizer's `step()`, every tensor allocated as its package would: ours in the arena."""
    ours = parameter(fill(arena.empty(n), 1), fill(arena.empty(n), 2))
    peers = [parameter(fill(torch.empty(n), 1), fill(torch.empty(n), 2)) for _ in range(2)]
    return {
        "ds_core": optim.FusedAdam([ours], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY).step,
        "DeepSpeed": DeepSpeedCPUAdam([peers[0]], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY).step,
        "torch fused": torch.optim.AdamW(
            [peers[1]], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        ).step,
        "same traffic, huge pages": traffic(n, arena.empty),
    }  # type: ignore[return-value]


def shared_memory(n: int) -> Steps:
    """The bare kernels on one set of ordinary buffers (4 KiB pages)."""
    p, g = fill(torch.empty(n), 1), fill(torch.empty(n), 2)
    m, v = torch.zeros(n), torch.zeros(n)
    peer = DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))], lr=LR)
    count = torch.tensor(2.0)

    def ours() -> None:
        kernels.adam_step(
            [p], [m], [v], [g], step=2, lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY
        )

    def deepspeed() -> None:
        peer.ds_opt_adam.adam_update(peer.opt_id, 2, LR, *BETAS, EPS, DECAY, True, p, g, m, v)

    def fused() -> None:
        torch._fused_adamw_([p], [g], [m], [v], [], [count], lr=LR, beta1=BETAS[0], beta2=BETAS[1],
                            weight_decay=DECAY, eps=EPS, amsgrad=False, maximize=False)  # fmt: skip

    return {
        "ds_core": ours,
        "DeepSpeed": deepspeed,
        "torch fused": fused,
        "same traffic": traffic(n, torch.empty),
    }


def low_precision_phase(n: int) -> Steps:
    """From bf16 gradients to bf16 parameters: norm, unscale, clip, Adam, cast. Peers: one pass for each but the scale.

    Peers get the scale and the clip factor in one multiplication, as DeepSpeed's ZeRO does.
    """
    grad16 = fill(torch.empty(n, dtype=torch.bfloat16), 2)
    master, ours16 = nn.Parameter(fill(arena.empty(n), 1)), torch.empty(n, dtype=torch.bfloat16)
    m, v = arena.zeros(n), arena.zeros(n)  # kernels: a parameter's .grad must have its own dtype
    own_grad = fill(arena.empty(n, torch.bfloat16), 2)

    def ours() -> None:
        squared, _ = kernels.squared_norm([own_grad])
        factor = min(1.0, CLIP * LOSS_SCALE / (squared**0.5 + 1e-6)) / LOSS_SCALE
        kernels.adam_step([master], [m], [v], [own_grad], step=2, lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS,
                          weight_decay=DECAY, grad_scale=factor, out=[ours16])  # fmt: skip

    steps: Steps = {"ds_core": ours}
    for name, kind in (("DeepSpeed", DeepSpeedCPUAdam), ("torch fused", torch.optim.AdamW)):
        steps[name] = _separate_passes(n, grad16, kind, {"fused": True} if kind is torch.optim.AdamW else {})
    return steps


def _separate_passes(
    n: int, grad16: Tensor, kind: type[torch.optim.Optimizer], extra: dict[str, bool]
) -> Callable[[], None]:
    master = parameter(fill(torch.empty(n), 1), torch.empty(n))
    param16 = torch.empty(n, dtype=torch.bfloat16)
    optimizer = kind([master], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **extra)

    def step() -> None:
        grad = master.grad
        assert grad is not None
        grad.copy_(grad16)
        norm = grad.norm().item()
        grad.mul_(min(1.0, CLIP * LOSS_SCALE / (norm + 1e-6)) / LOSS_SCALE)
        optimizer.step()
        param16.copy_(master.detach())

    return step


def _adam(
    params: Tensor, moments: tuple[Tensor, Tensor], grads: Tensor, out: Tensor | None, low: Tensor | None
) -> Callable[[], None]:
    """A step of Adam whose stochastic rounding has a new key each time, as the optimizers do it."""
    step = 1

    def run() -> None:
        nonlocal step
        step += 1
        form = formats.StepFormats(
            rounding=formats.rounding_key(0, step), master_bits=None if low is None else [low]
        )
        kernels.adam_step([params], [moments[0]], [moments[1]], [grads], step=step, lr=LR, beta1=BETAS[0],
                          beta2=BETAS[1], eps=EPS, weight_decay=DECAY, out=[out], formats=form)  # fmt: skip

    return run


def _moments(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return arena.zeros(n, dtype), arena.zeros(n, dtype)


def states_in(dtype: torch.dtype, grad: torch.dtype) -> Callable[[int], Steps]:
    """fp32 parameters with states of another dtype. With 16-bit gradients there is a 16-bit copy of the parameters,
    too; the peers widen gradients and write the copy in passes of their own.
    """

    def make(n: int) -> Steps:
        wide = grad == torch.float32
        own_grad = fill(arena.empty(n, grad), 2)
        copy = None if wide else arena.empty(n, grad)
        steps: Steps = {"ds_core": _adam(fill(arena.empty(n), 1), _moments(n, dtype), own_grad, copy, None)}
        if wide:
            peers = own_memory(n)
            steps |= {"our fp32 states": peers["ds_core"], "DeepSpeed": peers["DeepSpeed"],
                      "torch fused": peers["torch fused"]}  # fmt: skip
        else:
            steps |= _casting_peers(n)
        return steps

    return make


def split_masters(n: int) -> Steps:
    """bf16 parameters and 16 more bits with fp32 states: 26 bytes a parameter."""
    low = arena.zeros(n, torch.int16)
    params, grads = (fill(arena.empty(n, torch.bfloat16), seed) for seed in (1, 2))
    return {"ds_core": _adam(params, _moments(n, torch.float32), grads, None, low), **_casting_peers(n)}


def _casting_peers(n: int) -> Steps:
    """From bf16 gradients to bf16 parameters in three passes: widen, step, round."""
    grad16 = fill(torch.empty(n, dtype=torch.bfloat16), 2)
    steps: Steps = {}
    for name, kind in (("DeepSpeed", DeepSpeedCPUAdam), ("torch fused", torch.optim.AdamW)):
        more: dict[str, Any] = {"fused": True} if name == "torch fused" else {}
        master = parameter(fill(torch.empty(n), 1), torch.empty(n))
        param16 = torch.empty(n, dtype=torch.bfloat16)
        optimizer = kind([master], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **more)

        def step(
            master: nn.Parameter = master, param16: Tensor = param16, optimizer: Any = optimizer
        ) -> None:
            assert master.grad is not None
            master.grad.copy_(grad16)
            optimizer.step()
            param16.copy_(master.detach())

        steps[name] = step
    return steps


def one_state(kind: type[torch.optim.Optimizer], **options: float) -> Callable[[int], Steps]:
    """An optimizer with one fp32 state beside the loop with its traffic."""

    def make(n: int) -> Steps:
        ours = parameter(fill(arena.empty(n), 1), fill(arena.empty(n), 2))
        return {
            "ds_core": kind([ours], lr=LR, **options).step,  # type: ignore[call-arg]
            "same traffic, huge pages": traffic(n, arena.empty, 1),
        }  # type: ignore[return-value]

    return make


OWN = "own memory, optimizer.step()"
SHARED = "shared ordinary buffers, bare kernels"
PHASE = "bf16 gradients to bf16 parameters"
SAME = "same traffic, huge pages"
SECTIONS = {
    "own": Section(OWN, own_memory, {
        10**8: (Goal(SAME, 0.97),),
        5 * 10**7: (Goal(SAME, 0.97),),
        10**6: (Goal("torch fused", 1.3),),
    }),
    "shared": Section(SHARED, shared_memory, {n: (Goal("DeepSpeed", 0.97),) for n in (10**8, 10**6)}),
    "phase": Section(PHASE, low_precision_phase, {
        n: (Goal("DeepSpeed", 1.6), Goal("torch fused", 1.6)) for n in (10**8, 10**6)
    }),
    "8-bit": Section("8-bit states, fp32 gradients: 16 bytes a parameter", states_in(torch.uint8, torch.float32),
                     {10**8: (Goal("DeepSpeed", 1.8),)}),
    "8-bit-phase": Section("8-bit states, bf16 gradients to bf16 parameters: 16 bytes a parameter",
                           states_in(torch.uint8, torch.bfloat16), {10**8: (Goal("DeepSpeed", 1.8),)}),
    "bf16": Section("bf16 states, stochastic rounding, fp32 gradients: 20 bytes a parameter",
                    states_in(torch.bfloat16, torch.float32), {}),
    "split": Section("split masters, fp32 states, bf16 gradients: 26 bytes a parameter", split_masters,
                     {10**8: (Goal("DeepSpeed", 1.6), Goal("torch fused", 1.6))}),
    "adagrad": Section("Adagrad", one_state(optim.FusedAdagrad), {10**8: (Goal(SAME, 0.95),)}),
    "lion": Section("Lion", one_state(optim.FusedLion), {10**8: (Goal(SAME, 0.95),)}),
    "sgd": Section("SGD with momentum", one_state(optim.FusedSGD, momentum=0.9), {10**8: (Goal(SAME, 0.95),)}),
}  # fmt: skip
ALL_SIZES = ("own", "shared", "phase")
"""Sections that are measured at all sizes; the others only at the largest."""


def measure(steps: Steps, rounds: int, repeats: int) -> dict[str, float]:
    """The 20th percentile of seconds per step of each contender."""
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        steps[name]()
        steps[name]()
    for turn in range(rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            steps[name]()  # not timed: what the contender before left in caches and spinning threads
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name]()
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: float(np.percentile(t, 20)) for name, t in times.items()}


def run(section: Section, n: int, rounds: int, runs: int) -> tuple[list[str], bool]:
    """Rows of the table, and whether every goal is reached."""
    repeats = max(1, 10**7 // n)
    rounds = rounds * 3 if n <= 10**6 else rounds  # cheap there, and one preemption costs more than a step
    results, memory = [], ""
    for _ in range(runs):
        steps = section.make(n)
        results.append(measure(steps, rounds, repeats))
        memory = huge_pages()
        del steps
        gc.collect()
    rows, good = [f"| {n:.0e} | | | {memory} | |".replace("e+0", "e")], True
    goals = {goal.peer: goal.at_least for goal in section.goals.get(n, ())}
    for name in results[0]:
        ratios = [result[name] / result["ds_core"] for result in results]
        median = statistics.median(ratios)
        goal = goals.get(name)
        good &= goal is None or median >= goal
        verdict = "" if goal is None else f"{goal:.2f} {'reached' if median >= goal else 'MISSED'}"
        rate = statistics.median(n / result[name] / 1e6 for result in results)
        each = " ".join(f"{r:.2f}" for r in ratios)
        rows.append(
            f"| {n:.0e} | {name} | {rate:.0f} | {median:.2f} ({each}) | {verdict} |".replace("e+0", "e")
        )
    return rows, good


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    return (f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"Python {platform.python_version()}, huge pages {pages}, load {os.getloadavg()[0]:.1f}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/bench adam", description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e8, 5e7, 1e6])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=list(SECTIONS), nargs="+", help="some sections")
    parser.add_argument("--write", action="store_true", help="put the result into docs/benchmarks/adam.md")
    options = parser.parse_args()
    lines = [f"Machine: {machine()}.", f"Command: `ci/bench {' '.join(['adam', *sys.argv[1:]])}`", ""]
    good = True
    for name in options.only or SECTIONS:
        section = SECTIONS[name]
        lines += [f"### {section.title}", "", "| parameters | contender | Mparam/s | time / ours (runs) | goal |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for size in options.sizes if name in ALL_SIZES else [max(options.sizes)]:
            rows, reached = run(section, int(size), options.rounds, options.runs)
            print("\n".join(rows), flush=True)
            lines += rows
            good &= reached
        lines.append("")
    if options.write:
        path = Path("docs/benchmarks/adam.md")
        head = path.read_text().split("<!-- results -->")[0] if path.exists() else "# CPU Adam\n\n"
        path.write_text(head + "<!-- results -->\n" + "\n".join(lines))
    print("\n".join(lines))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
