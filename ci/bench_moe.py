"""Mixtures of experts on a CPU: grouped experts against loops, the layer against a dense one, and against DeepSpeed's.

ci/bench moe [--rounds N] [--no-peer [--wire]]

Each figure is the best of N rounds, in which the compared ones take turns. One step is forward and backward. The loops:
"sorted" runs expert after expert on rows that are sorted already, as `experts_by="loop"` does; "masked" searches the
tokens of each expert and adds its outputs, as most model code does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_moe

Step = Callable[[], object]


class Masked(nn.Module):
    """The experts of a layer, each of which searches its tokens."""

    def __init__(self, layer: ds_moe.MoE) -> None:
        super().__init__()
        self.router, self.experts = layer.router, layer.experts.experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = self.router(x)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, choice = torch.where(routing.experts == index)
            if token.numel():
                out.index_add_(0, token, expert(x[token]) * routing.weights[token, choice, None])
        return out, routing.aux_loss, routing.counts


class Alone(nn.Module):
    """The experts of a layer, on rows that are sorted by expert."""

    def __init__(self, layer: ds_moe.MoE, sizes: list[int]) -> None:
        super().__init__()
        self.experts, self._sizes = layer.experts, sizes

    def forward(self, rows: Tensor) -> Tensor:
        return self.experts(rows, self._sizes)  # type: ignore[no-any-return]


def best_ms(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Returns the shortest time of each in milliseconds; they take turns."""
    best = dict.fromkeys(steps, float("inf"))
    for number in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            if number > 1:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
    return best


def step_of(layer: nn.Module, x: Tensor) -> Step:
    """One forward and backward."""

    def step() -> None:
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.ones_like(out))
        for param in layer.parameters():
            param.grad = None
        x.grad = None

    return step


def layer_of(experts: int, hidden: int, inner: int, by: str, k: int = 1, **more: object) -> ds_moe.MoE:
    """A layer without drops, unless `more` says otherwise."""
    torch.manual_seed(0)
    arguments = {"drop_tokens": False, **more}
    return ds_moe.MoE(
        hidden,
        lambda: ds_moe.FeedForward(hidden, inner),
        num_experts=experts,
        k=k,
        experts_by=by,  # type: ignore[arg-type]
        **arguments,  # type: ignore[arg-type]
    )


def experts_alone(rounds: int) -> None:
    """The experts without router and dispatch: grouped, and one after the other on rows that are sorted already."""
    print("experts  hidden  inner  tokens  grouped  loop   (ms; ratio)")
    for experts, hidden, inner, tokens in (
        (8, 32, 128, 256),
        (32, 32, 128, 256),
        (64, 32, 128, 256),
        (64, 128, 512, 1024),
        (64, 256, 1024, 4096),
    ):
        rows = torch.randn(tokens, hidden, requires_grad=True)
        sizes = torch.bincount(torch.randint(experts, (tokens,)), minlength=experts).tolist()
        took = best_ms(
            {
                by: step_of(Alone(layer_of(experts, hidden, inner, by), sizes), rows)
                for by in ("grouped", "loop")
            },
            rounds if tokens < 1000 else max(3, rounds // 5),
        )
        print(
            f"{experts:7d} {hidden:7d} {inner:6d} {tokens:7d} {took['grouped']:8.3f} {took['loop']:7.2f}"
            f" ({took['loop'] / took['grouped']:4.1f}x)",
            flush=True,
        )


def against_loops(rounds: int) -> None:
    """Grouped experts and two loops."""
    print("experts  hidden  inner  tokens  grouped  sorted loop  masked loop   (ms; ratios to grouped)")
    for experts, hidden, inner, tokens in (
        (8, 32, 128, 256),
        (32, 32, 128, 256),
        (64, 32, 128, 256),
        (64, 128, 512, 1024),
        (64, 256, 1024, 4096),
    ):
        x = torch.randn(tokens, hidden, requires_grad=True)
        loop = layer_of(experts, hidden, inner, "loop")
        took = best_ms(
            {
                "grouped": step_of(layer_of(experts, hidden, inner, "grouped"), x),
                "sorted": step_of(loop, x),
                "masked": step_of(Masked(loop), x),
            },
            rounds if tokens < 1000 else max(3, rounds // 5),
        )
        one = took["grouped"]
        print(
            f"{experts:7d} {hidden:7d} {inner:6d} {tokens:7d} {one:8.2f}"
            f" {took['sorted']:6.2f} ({took['sorted'] / one:4.1f}x)"
            f" {took['masked']:6.2f} ({took['masked'] / one:4.1f}x)",
            flush=True,
        )


def against_dense(rounds: int) -> None:
    """The whole layer with one expert for each token against a dense feed-forward block of equal FLOPs."""
    print("\nexperts  hidden  inner  tokens  layer  dense  layer / dense   (ms)")
    for experts, hidden, inner, tokens in ((8, 256, 1024, 2048), (8, 512, 2048, 4096), (32, 512, 2048, 4096)):
        x = torch.randn(tokens, hidden, requires_grad=True)
        took = best_ms(
            {
                "layer": step_of(layer_of(experts, hidden, inner, "grouped"), x),
                "dense": step_of(ds_moe.FeedForward(hidden, inner), x),
            },
            max(3, rounds // 6),
        )
        ratio = took["layer"] / took["dense"]
        print(
            f"{experts:7d} {hidden:7d} {inner:6d} {tokens:7d} {took['layer']:6.1f} {took['dense']:6.1f} {ratio:8.3f}",
            flush=True,
        )


def against_peer(rounds: int) -> None:
    """DeepSpeed's layer in the same process, with the same experts, tokens and capacity."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.moe.layer import MoE

    import deepspeed

    if "+ds" in deepspeed.__version__:
        raise SystemExit("deepspeed is ds-compat here: run through ci/bench, or with --no-peer")
    # It would compile collectives, of which one rank has no use. (As an attribute, `deepspeed.comm.torch` is torch.)
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    print(f"\nDeepSpeed {deepspeed.__version__}, the whole layer")
    print("experts  k  hidden  inner  tokens  ours  DeepSpeed  ours / DeepSpeed   (ms)")
    for experts, k, hidden, inner, tokens in (
        (8, 1, 64, 256, 1024),
        (8, 2, 64, 256, 1024),
        (32, 1, 32, 128, 256),
        (32, 2, 128, 512, 2048),
    ):
        torch.manual_seed(0)
        theirs = MoE(hidden, ds_moe.FeedForward(hidden, inner), num_experts=experts, k=k)
        theirs.set_deepspeed_parallelism()
        ours = layer_of(experts, hidden, inner, "grouped", k, drop_tokens=True)
        x = torch.randn(tokens, hidden, requires_grad=True)
        took = best_ms({"ours": step_of(ours, x), "theirs": step_of(theirs, x)}, max(3, rounds // 3))
        ratio = took["ours"] / took["theirs"]
        print(
            f"{experts:7d} {k:2d} {hidden:7d} {inner:6d} {tokens:7d}"
            f" {took['ours']:6.2f} {took['theirs']:8.2f} {ratio:8.3f}",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    """Measures everything."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-peer", action="store_true", help="leave DeepSpeed out")
    parser.add_argument(
        "--wire", action="store_true", help="only: divided experts beside ZeRO-3 over a slow link"
    )
    args = parser.parse_args()
    if args.wire:
        from slow_link import compare_experts

        compare_experts.main([])
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), best of {args.rounds} rounds or fewer"
    )
    experts_alone(args.rounds)
    print()
    against_loops(args.rounds)
    against_dense(args.rounds)
    if not args.no_peer:
        against_peer(args.rounds)


if __name__ == "__main__":
    main()
