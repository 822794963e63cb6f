"""Kernels that encode and decode what compressed collectives send, against the memory, torch and other libraries.

    ci/bench codes [--mib 64] [--rounds 5] [--threads 2]

One row for each kernel: the bytes that it reads and writes a second, as a share of what a copy (`Tensor.copy_`) of as
many fp32 values reads and writes in the same round; and how many times faster it is than its reference in torch, and
than the same operation of bitsandbytes and torchao where they can be imported (`pip install bitsandbytes torchao`
into the environment). All are measured in turn in every round; medians. Blocks have 256 elements, those of signs 2048.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_comm.compress import Blocks
from ds_core import codes, codes_reference

Run = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One kernel: what it moves, and what does the same."""

    name: str
    num_bytes: float
    ours: Run
    reference: Run
    peers: dict[str, Run]


def rows(x: Tensor) -> list[Row]:
    """All kernels for one tensor."""
    numel, made = x.numel(), []
    residual, out = torch.zeros_like(x), torch.empty_like(x)
    for bits in (1, 4, 8):
        each = 2048 if bits == 1 else 256
        table = Blocks.uniform(numel, each).table
        scales, packed = torch.empty(len(table)), torch.empty(-(-numel * bits // 8), dtype=torch.uint8)
        small = numel * bits / 8 + 4 * len(table)
        encoded = (x, table, scales, packed)
        decoded = (scales, packed, table, out)
        for held in (None, residual):
            name = f"{bits} bit{'s' * (bits > 1)}: encode" + (" with residual" if held is not None else "")
            moved = (4 if held is None else 12) * numel + small
            made.append(
                Row(name, moved, encoder(codes, bits, encoded, held), encoder(codes_reference, bits, encoded, held),
                    encoders(x, bits, each) if held is None else {})
            )  # fmt: skip
        made.append(
            Row(f"{bits} bit{'s' * (bits > 1)}: decode", 4 * numel + small, decoder(codes, bits, decoded),
                decoder(codes_reference, bits, decoded), decoders(x, bits, each))
        )  # fmt: skip
    return made


def encoder(module: Any, bits: int, arguments: tuple[Tensor, ...], residual: Tensor | None) -> Run:
    """A call that encodes."""
    if bits == 1:
        return lambda: module.sign_encode(*arguments, residual)
    return lambda: module.int_encode(*arguments, residual, bits=bits, seed=None)


def decoder(module: Any, bits: int, arguments: tuple[Tensor, ...]) -> Run:
    """A call that decodes."""
    if bits == 1:
        return lambda: module.sign_decode(*arguments, weight=1.0, add=False)
    return lambda: module.int_decode(*arguments, bits=bits, weight=1.0, add=False)


def imported(name: str) -> Any:
    """A module of a peer; None if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, AttributeError):
        return None


def encoders(x: Tensor, bits: int, each: int) -> dict[str, Run]:
    """What other libraries offer for the same number of bits in blocks."""
    bnb, ao = imported("bitsandbytes.functional"), imported("torchao.quantization.quant_primitives")
    found: dict[str, Run] = {}
    if bnb is not None and bits == 8:
        found["bitsandbytes"] = lambda: bnb.quantize_blockwise(x, blocksize=each)
    if bnb is not None and bits == 4:
        found["bitsandbytes"] = lambda: bnb.quantize_4bit(x, blocksize=each, quant_type="nf4")
    if ao is not None and bits == 8:

        def quantized() -> Any:
            kinds = torch.int8, -128, 127
            scale, zero = ao.choose_qparams_affine(x, ao.MappingType.SYMMETRIC, (each,), *kinds)
            return ao.quantize_affine(x, (each,), scale, zero, *kinds)

        found["torchao"] = quantized
    return found


def decoders(x: Tensor, bits: int, each: int) -> dict[str, Run]:
    """The same for decoding."""
    bnb = imported("bitsandbytes.functional")
    if bnb is None or bits == 1:
        return {}
    if bits == 8:
        code, state = bnb.quantize_blockwise(x, blocksize=each)
        return {"bitsandbytes": lambda: bnb.dequantize_blockwise(code, state)}
    code, state = bnb.quantize_4bit(x, blocksize=each, quant_type="nf4")
    return {"bitsandbytes": lambda: bnb.dequantize_4bit(code, state)}


def seconds(run: Run) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=64, help="size of the fp32 tensor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.mib << 18, generator=torch.Generator().manual_seed(0))
    target = torch.empty_like(x)
    made = rows(x)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(options.rounds + 1):
        for row in made:
            runs = {"copy": lambda: target.copy_(x), "ours": row.ours, "torch": row.reference, **row.peers}
            for name, run in runs.items():
                taken = seconds(run)
                if turn:  # the first round warms up
                    times.setdefault((row.name, name), []).append(taken)
    peers = sorted({name for _, name in times} - {"copy", "ours", "torch"})
    heads = ["kernel", "GB/s", "of a copy", "times torch", *(f"times {peer}" for peer in peers)]
    print(f"{options.mib} MiB of fp32, {options.threads} threads, {options.rounds} rounds\n")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in made:
        middle = {n: statistics.median(t) for (kernel, n), t in times.items() if kernel == row.name}
        rate, copied = row.num_bytes / middle["ours"], 2 * x.nbytes / middle["copy"]
        cells = [
            row.name,
            f"{rate / 1e9:.1f}",
            f"{rate / copied:.2f}",
            f"{middle['torch'] / middle['ours']:.1f}",
        ]
        cells += [f"{middle[peer] / middle['ours']:.1f}" if peer in middle else "" for peer in peers]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
