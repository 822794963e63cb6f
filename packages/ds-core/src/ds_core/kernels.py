"""The kernels: native if there is a variant for the tensors' device, else the reference in plain torch.

Multi-tensor functions take lists (or any other iterable of tensors) and make one native call for all of them, without
the GIL, on `ds_core.threads.count()` threads (on a GPU: on torch's current stream). Tensors must be contiguous, have
memory, and be on one device; any other tensor raises a ValueError that names the argument. Results do not depend on
the number of threads, on how a tensor is split, or on the CPU target. `python -m ds_core` prints which kernels are
native here.

Common arguments of the optimizer steps, all of which work in place:

* `params` fp32; states fp32 or bf16, rounded to nearest even; `grads` fp32, bf16 or fp16, also mixed within one list.
* `formats`, on the CPU: allows 16-bit `params` and 8-bit states, and says how they are rounded. Arithmetic is in fp32.
* `grad_scale`: a gradient is widened, multiplied by it and rounded to fp32 before anything else: the same bits as
  gradients multiplied beforehand.
* `out[i]`, where not None, receives the new `params[i]` rounded to its dtype (fp32, bf16, fp16) in the same pass.
* `step` counts from 1 and includes this step.
* `checksums`: a pair of lists, with one int64 tensor of zeros for each parameter, of `rows * num_checksums(numel)`
  elements. They receive the checksums of what the step reads and of what it writes: gradient, parameter, states,
  `master_bits` if it has any; the gradient's row of the second stays zero. Only where `checksums_in_pass(params[0])`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ds_core import _gpu, _native, reference, threads
from ds_core.formats import StepFormats, master_bits, native_formats, widened

NORM_BLOCK_NUMEL = reference.NORM_BLOCK_NUMEL
CHECKSUM_BLOCK_NUMEL = reference.CHECKSUM_BLOCK_NUMEL
T = TypeVar("T")
Checksums = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Receives the checksums of what a step reads, and of what it writes."""


def checksums_in_pass(tensor: Tensor) -> bool:
    """Whether a step on this device computes checksums in its pass over memory; elsewhere call `checksums` before and
    after it.
    """
    return tensor.device.type == "cpu" and _native.has_native()


def _no_checksums(function: str, checksums: Checksums | None) -> None:
    if checksums is not None:
        raise ValueError(
            f"{function}: checksums need the native kernels of the CPU; call checksums before and after the step"
        )


def _listed(function: str, name: str, tensors: Iterable[T]) -> Sequence[T]:
    """Converts a list argument to a sequence once, because both the kernel and `_written` iterate over it."""
    if isinstance(tensors, (list, tuple)):
        return tensors
    if isinstance(tensors, Tensor):
        raise ValueError(f"{function}: {name} must be a sequence of tensors, but is one tensor; pass [x]")
    if not isinstance(tensors, Iterable):
        raise ValueError(
            f"{function}: {name} must be a sequence of tensors, but is a {type(tensors).__name__}"
        )
    return list(tensors)


def _lists(function: str, **arguments: Iterable[Tensor]) -> list[Sequence[Tensor]]:
    """Converts several list arguments of one function."""
    return [_listed(function, name, tensors) for name, tensors in arguments.items()]


def _outs(function: str, out: Iterable[Tensor | None] | None) -> Sequence[Tensor | None] | None:
    return None if out is None else _listed(function, "out", out)


def _written(*lists: Sequence[Tensor | None] | None) -> None:
    """Tells autograd what a kernel wrote, so that a backward over overwritten values raises instead of being wrong."""
    increment_version([t for tensors in lists if tensors is not None for t in tensors if t is not None])


def adam_step(
    params: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    grads: Iterable[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    grad_scale: float = 1.0,
    out: Iterable[Tensor | None] | None = None,
    checksums: Checksums | None = None,
    formats: StepFormats | None = None,
) -> None:
    """One step of AdamW (`decoupled`, Loshchilov and Hutter 2019, algorithm 2) or Adam with L2 regularisation."""
    params, exp_avgs, exp_avg_sqs, grads = _lists(
        "adam_step", params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, grads=grads
    )
    out = _outs("adam_step", out)
    if not params:
        return
    if not _gpu.takes(params[0]):
        _no_checksums("adam_step", checksums)
        with widened(params, [exp_avgs, exp_avg_sqs], out, formats) as (wide, own, copies):
            reference.adam_step(
                wide, own[0], own[1], grads, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
                weight_decay=weight_decay, decoupled=decoupled, grad_scale=grad_scale, out=copies,
            )  # fmt: skip
        return
    _native.core.adam_step(
        params, exp_avgs, exp_avg_sqs, grads, out, step, lr, beta1, beta2, eps, weight_decay, decoupled,
        grad_scale, threads.count(), checksums, native_formats(formats),
    )  # fmt: skip
    _written(params, exp_avgs, exp_avg_sqs, out, master_bits(formats))


def adagrad_step(
    params: Iterable[Tensor],
    sums: Iterable[Tensor],
    grads: Iterable[Tensor],
    *,
    step: int,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    out: Iterable[Tensor | None] | None = None,
    checksums: Checksums | None = None,
    formats: StepFormats | None = None,
) -> None:
    """One step of Adagrad (Duchi, Hazan and Singer 2011) as `torch.optim.Adagrad` defines it."""
    params, sums, grads = _lists("adagrad_step", params=params, sums=sums, grads=grads)
    out = _outs("adagrad_step", out)
    if not params:
        return
    if not _gpu.takes(params[0]):
        _no_checksums("adagrad_step", checksums)
        with widened(params, [sums], out, formats) as (wide, own, copies):
            reference.adagrad_step(
                wide, own[0], grads, step=step, lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay,
                grad_scale=grad_scale, out=copies,
            )  # fmt: skip
        return
    _native.core.adagrad_step(
        params, sums, grads, out, step, lr, lr_decay, eps, weight_decay, grad_scale, threads.count(),
        checksums, native_formats(formats),
    )  # fmt: skip
    _written(params, sums, out, master_bits(formats))


def lion_step(
    params: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    grads: Iterable[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    out: Iterable[Tensor | None] | None = None,
    checksums: Checksums | None = None,
    formats: StepFormats | None = None,
) -> None:
    """One step of Lion (Chen et al. 2023, algorithm 2), weight decay decoupled."""
    params, exp_avgs, grads = _lists("lion_step", params=params, exp_avgs=exp_avgs, grads=grads)
    out = _outs("lion_step", out)
    if not params:
        return
    if not _gpu.takes(params[0]):
        _no_checksums("lion_step", checksums)
        with widened(params, [exp_avgs], out, formats) as (wide, own, copies):
            reference.lion_step(
                wide, own[0], grads, lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
                grad_scale=grad_scale, out=copies,
            )  # fmt: skip
        return
    _native.core.lion_step(
        params, exp_avgs, grads, out, lr, beta1, beta2, weight_decay, grad_scale, threads.count(),
        checksums, native_formats(formats),
    )  # fmt: skip
    _written(params, exp_avgs, out, master_bits(formats))


def sgd_step(
    params: Iterable[Tensor],
    momentum_buffers: Iterable[Tensor] | None,
    grads: Iterable[Tensor],
    *,
    first: bool,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    grad_scale: float = 1.0,
    out: Iterable[Tensor | None] | None = None,
    checksums: Checksums | None = None,
    formats: StepFormats | None = None,
) -> None:
    """One step of SGD as `torch.optim.SGD` defines it.

    `momentum_buffers` is required if `momentum` is not 0, and unused otherwise. If `first`, the buffers are
    uninitialised and are set to the gradient.
    """
    params, grads = _lists("sgd_step", params=params, grads=grads)
    out = _outs("sgd_step", out)
    if not params:
        return
    if momentum != 0.0 and momentum_buffers is None:
        raise ValueError(
            f"sgd_step: momentum is {momentum}, so momentum_buffers must be a list of tensors, not None"
        )
    if momentum_buffers is not None:
        momentum_buffers = _listed("sgd_step", "momentum_buffers", momentum_buffers)
    if not _gpu.takes(params[0]):
        _no_checksums("sgd_step", checksums)
        with widened(params, [momentum_buffers], out, formats) as (wide, own, copies):
            reference.sgd_step(
                wide, own[0], grads, first=first, lr=lr, momentum=momentum, dampening=dampening,
                weight_decay=weight_decay, nesterov=nesterov, grad_scale=grad_scale, out=copies,
            )  # fmt: skip
        return
    _native.core.sgd_step(
        params, momentum_buffers, grads, out, first, lr, momentum, dampening, weight_decay, nesterov, grad_scale,
        threads.count(), checksums, native_formats(formats),
    )  # fmt: skip
    _written(params, momentum_buffers if momentum != 0.0 else None, out, master_bits(formats))


def lamb_step(
    params: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    grads: Iterable[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    min_ratio: float = 0.0,
    max_ratio: float = math.inf,
    grad_scale: float = 1.0,
    out: Iterable[Tensor | None] | None = None,
) -> None:
    """One step of LAMB (You et al. 2020, algorithm 2): each tensor is a segment with a trust ratio of its own.

    If segments continue on other ranks, call `lamb_moments`, sum its result over the ranks, then call `trust_ratios`
    and `lamb_apply`. Equations: docs/notes/lamb.md.
    """
    params, exp_avgs, exp_avg_sqs, grads = _lists(
        "lamb_step", params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, grads=grads
    )
    norms = lamb_moments(
        params, exp_avgs, exp_avg_sqs, grads, step=step, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, grad_scale=grad_scale,
    )  # fmt: skip
    lamb_apply(
        params, exp_avgs, exp_avg_sqs, trust_ratios(norms, min_ratio, max_ratio), step=step, lr=lr, beta1=beta1,
        beta2=beta2, eps=eps, weight_decay=weight_decay, out=out,
    )  # fmt: skip


def lamb_moments(
    params: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    grads: Iterable[Tensor],
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> Tensor:
    """First pass of LAMB: updates both moments.

    Returns an fp64 CPU tensor (number of tensors, 2): the sums of squares of each parameter and of its direction.
    """
    params, exp_avgs, exp_avg_sqs, grads = _lists(
        "lamb_moments", params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, grads=grads
    )
    if not params:
        return torch.zeros(0, 2, dtype=torch.float64)
    if not _gpu.takes(params[0]):
        return reference.lamb_moments(
            params, exp_avgs, exp_avg_sqs, grads, step=step, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, grad_scale=grad_scale,
        )  # fmt: skip
    blocks = [-(-p.numel() // NORM_BLOCK_NUMEL) for p in params]
    on_cpu = params[0].device.type == "cpu"
    sums = torch.zeros(
        len(params) if on_cpu else sum(blocks), 2, dtype=torch.float64, device=params[0].device
    )
    _native.core.lamb_moments(
        params, exp_avgs, exp_avg_sqs, grads, sums, step, beta1, beta2, eps, weight_decay, grad_scale,
        threads.count(),
    )  # fmt: skip
    _written(exp_avgs, exp_avg_sqs)
    if on_cpu:
        return sums
    return torch.tensor([_in_order(part) for part in sums.cpu().split(blocks)], dtype=torch.float64).view(
        -1, 2
    )


def _in_order(block_sums: Tensor) -> list[float]:
    """Sums two columns from the first block to the last, as the CPU kernels do."""
    totals = [0.0, 0.0]
    for first, second in block_sums.tolist():
        totals[0] += first
        totals[1] += second
    return totals


def trust_ratios(norms: Tensor, min_ratio: float = 0.0, max_ratio: float = math.inf) -> list[float]:
    """Returns |p| / |u| from the rows of `lamb_moments`, clamped to [min_ratio, max_ratio]; 1 if either norm is 0."""
    ratios = []
    for param_squared, direction_squared in norms.tolist():
        if param_squared == 0.0 or direction_squared == 0.0:
            ratios.append(1.0)
        else:
            ratio = math.sqrt(param_squared) / math.sqrt(direction_squared)
            ratios.append(min(max(ratio, min_ratio), max_ratio))
    return ratios


def lamb_apply(
    params: Iterable[Tensor],
    exp_avgs: Iterable[Tensor],
    exp_avg_sqs: Iterable[Tensor],
    ratios: Sequence[float],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    out: Iterable[Tensor | None] | None = None,
) -> None:
    """Second pass of LAMB: `params[i] -= lr * ratios[i] * direction[i]`."""
    params, exp_avgs, exp_avg_sqs = _lists(
        "lamb_apply", params=params, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs
    )
    out = _outs("lamb_apply", out)
    if not params:
        return
    if not _gpu.takes(params[0]):
        reference.lamb_apply(
            params, exp_avgs, exp_avg_sqs, ratios, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
            weight_decay=weight_decay, out=out,
        )  # fmt: skip
        return
    _native.core.lamb_apply(
        params, exp_avgs, exp_avg_sqs, out, ratios, step, lr, beta1, beta2, eps, weight_decay,
        threads.count(),
    )  # fmt: skip
    _written(params, out)


def squared_norm(tensors: Iterable[Tensor]) -> tuple[float, bool]:
    """Returns the sum of squares of all elements (fp32, bf16 or fp16) in fp64, and whether all are finite, in one
    pass.

    Added in blocks of `NORM_BLOCK_NUMEL` elements from each tensor's start, blocks in order.
    """
    tensors = _listed("squared_norm", "tensors", tensors)
    if not tensors:
        return 0.0, True
    if tensors[0].device.type == "cpu" and _native.has_native():
        return _native.core.squared_norm(tensors, threads.count())
    if not _gpu.takes(tensors[0]):
        return reference.squared_norm(tensors)
    total = 0.0
    for block in torch.cat([squared_norm_blocks(tensor) for tensor in tensors]).tolist():
        total += block
    return total, math.isfinite(total)


def squared_norm_blocks(tensor: Tensor, block_numel: int = NORM_BLOCK_NUMEL) -> Tensor:
    """The fp64 sums of squares of consecutive blocks of `block_numel` elements (the last may be shorter), 1-D.

    Sums of the same elements are equal bit by bit wherever the block lies.
    """
    if block_numel < 1:
        raise ValueError(f"squared_norm_blocks: block_numel must be positive, but is {block_numel}")
    if not _gpu.takes(tensor):
        return reference.squared_norm_blocks(tensor, block_numel)
    sums = torch.empty(-(-tensor.numel() // block_numel), dtype=torch.float64, device=tensor.device)
    _native.core.squared_norm_blocks(tensor, block_numel, sums, threads.count())
    return sums


def cast(src: Tensor | Iterable[Tensor], dst: Tensor | Iterable[Tensor]) -> None:
    """Converts between fp32, bf16 and fp16, to nearest even; a NaN stays a NaN. One tensor each, or lists."""
    sources = [src] if isinstance(src, Tensor) else _listed("cast", "src", src)
    destinations = [dst] if isinstance(dst, Tensor) else _listed("cast", "dst", dst)
    if not sources and not destinations:
        return
    if not _gpu.takes([*sources, *destinations][0]):
        reference.cast(sources, destinations)
        return
    _native.core.cast(sources, destinations, threads.count())
    _written(destinations)


def pack_signs(x: Tensor, bits: Tensor | None = None) -> tuple[Tensor, float]:
    """Packs the signs of `x` (fp32, bf16, fp16) into uint8, eight to a byte, lowest bit first, 1 for negative.

    Returns `bits` (allocated if None; ceil(numel / 8) bytes) and the mean of |x|. With this scale, `unpack_signs`
    approximates `x` with the least sum of squared errors. The mean is summed in fp64 in a fixed order.
    """
    if not _gpu.takes(x):
        return reference.pack_signs(x, bits)
    if bits is None:
        bits = torch.empty(-(-x.numel() // 8), dtype=torch.uint8, device=x.device)
    on_cpu = x.device.type == "cpu"
    blocks = 0 if on_cpu else -(-x.numel() // NORM_BLOCK_NUMEL)
    sums = torch.zeros(blocks, dtype=torch.float64, device=x.device)
    total = _native.core.pack_signs(x, bits, sums, threads.count())
    for block in sums.tolist():
        total += block
    _written([bits])
    return bits, total / max(x.numel(), 1)


def unpack_signs(bits: Tensor, scale: float, out: Tensor) -> Tensor:
    """Writes -scale where a bit of `bits` is set, else scale, into `out` (fp32, bf16, fp16), and returns it."""
    if not _gpu.takes(out):
        return reference.unpack_signs(bits, scale, out)
    _native.core.unpack_signs(bits, scale, out, threads.count())
    _written([out])
    return out


def num_checksums(numel: int) -> int:
    """Returns the number of blocks of a tensor of `numel` elements."""
    return -(-numel // CHECKSUM_BLOCK_NUMEL)


def checksums(tensors: Iterable[Tensor], out: Iterable[Tensor] | None = None) -> Sequence[Tensor]:
    """Returns the checksums of each block of `CHECKSUM_BLOCK_NUMEL` elements (fp32, bf16, fp16) of each tensor: 1-D
    int64, in `out` if given.

    A changed word of 32 bits, two flipped bits, or two exchanged words of one block always change its checksum; other
    changes do with a probability of 1 - 2^-64. Formula: cpp/include/ds/checksum.h.
    """
    tensors = _listed("checksums", "tensors", tensors)
    if out is None:
        out = [torch.empty(num_checksums(t.numel()), dtype=torch.int64, device=t.device) for t in tensors]
    out = _listed("checksums", "out", out)
    if tensors and not checksums_in_pass(tensors[0]):
        return reference.checksums(tensors, out)
    _native.core.checksums(tensors, out, threads.count())
    _written(out)
    return out


def crc32c(data: Tensor | bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC-32C of the bytes of a contiguous CPU tensor or a buffer, continuing from `crc` (0 at the start)."""
    if not _native.has_native():
        return reference.crc32c(data, crc)
    if not isinstance(data, Tensor):
        return _native.core.crc32c(data, crc, threads.count())
    if data.device.type != "cpu":
        raise ValueError(f"crc32c: data must be on the CPU, but is on {data.device}")
    if not data.is_contiguous():
        raise ValueError("crc32c: data must be contiguous; pass data.contiguous()")
    if data.numel() == 0:
        return crc
    if data.untyped_storage().nbytes() == 0:
        raise ValueError("crc32c: data has no memory: its storage was freed")
    values = data.detach().resolve_conj().resolve_neg()
    # Not `values.numpy()`: torch then refuses to resize the storage, as ds_zero does with that of gathered parameters.
    memory = (ctypes.c_uint8 * values.nbytes).from_address(values.data_ptr())
    return _native.core.crc32c(memory, crc, threads.count())
