"""Block-sparse attention beside torch's dense attention.  `ci/bench sparse [--tokens 4096 8192] [--rounds N]
[--dtype bfloat16]`

Each round runs both in turn, forward and backward, in the CPU time of the process; the fastest round of each counts,
because a busy machine only adds time. "of 1/density" is the speed-up divided by that of a kernel that would compute a
block as fast as the dense one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ds_layers import sdpa
from ds_layers.sparse import (
    BigBirdSparsityConfig,
    BlockSparseAttention,
    BSLongformerSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
)

HEADS, DIM = 2, 64


def patterns(block: int) -> dict[str, SparsityConfig]:
    """Patterns of at most a quarter of the blocks, with windows of about the same number of tokens."""
    window = 576 // block | 1
    return {
        "sliding window": LocalSlidingWindowSparsityConfig(HEADS, block, window, "bidirectional"),
        "bslongformer": BSLongformerSparsityConfig(HEADS, block, num_sliding_window_blocks=window),
        "bigbird": BigBirdSparsityConfig(HEADS, block, num_random_blocks=2, num_sliding_window_blocks=window),
        "fixed": FixedSparsityConfig(HEADS, block, num_local_blocks=512 // block),
    }


def step(attention: Callable[..., Tensor], inputs: list[Tensor], backward: bool) -> Callable[[], None]:
    """Returns a function that runs attention once."""

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = attention(*inputs[:3])
            if backward:
                torch.autograd.grad(out, inputs[:3], inputs[3])

    return run


def fastest(contenders: list[Callable[[], None]], rounds: int) -> list[float]:
    """Returns the least CPU time of each contender in seconds; each round runs all of them."""
    times = [float("inf")] * len(contenders)
    for run in contenders:
        run()
    for _ in range(rounds):
        for index, run in enumerate(contenders):
            start = time.process_time()
            run()
            times[index] = min(times[index], time.process_time() - start)
    return times


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print("| tokens | block | pattern | density | forward | of 1/density | both | of 1/density |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in options.tokens:
        inputs = [torch.randn(1, tokens, HEADS, DIM).to(dtype).requires_grad_() for _ in range(3)]
        inputs.append(torch.randn(1, tokens, HEADS, DIM).to(dtype))
        for block in options.blocks:
            chosen = patterns(block)
            ours = {
                name: BlockSparseAttention(config, backend=options.backend) for name, config in chosen.items()
            }
            times = [
                fastest([step(f, inputs, backward) for f in (sdpa, *ours.values())], options.rounds)
                for backward in (False, True)
            ]
            for index, (name, attention) in enumerate(ours.items(), 1):
                density = attention.density(HEADS, tokens)
                ratios = [dense[0] / dense[index] for dense in times]
                cells = " | ".join(f"{ratio:.1f} x | {ratio * density:.2f}" for ratio in ratios)
                print(f"| {tokens} | {block} | {name} | {density:.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
