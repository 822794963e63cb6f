"""The kernels of `ds_core.kernels` in plain torch: the reference in their tests, and the fallback if no native kernel
exists.

Each function performs the same fp32 operations in the same order as its native twin, so that results agree bit by
bit on every device whose torch rounds as IEEE 754 says. Formulas: `cpp/include/ds/*.h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NORM_BLOCK_NUMEL = 16 * 1024
"""Elements per block of `squared_norm`; part of the result's definition."""

CHECKSUM_BLOCK_NUMEL = 4096
"""Elements per block of `checksums`; part of the result's definition."""
CHECKSUM_FACTOR = 0x9E3779B1


def _outs(out: Sequence[Tensor | None] | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if out is None else out


def _scaled(grad: Tensor, grad_scale: float) -> Tensor:
    return grad.to(torch.float32) * grad_scale


def _sqrt(x: Tensor) -> Tensor:
    """The correctly rounded root: torch's own on fp32 may be off by one unit in the last place (vector libraries)."""
    return x.to(torch.float64).sqrt().to(torch.float32)


@torch.no_grad()
def adam_step(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    grad_scale: float = 1.0,
    out: Sequence[Tensor | None] | None = None,
) -> None:
    """See `ds_core.kernels.adam_step`."""
    step_size = -lr / (1.0 - beta1**step)
    inv_bias2_sqrt = 1.0 / math.sqrt(1.0 - beta2**step)
    for p, m, v, grad, copy in zip(
        params, exp_avgs, exp_avg_sqs, grads, _outs(out, len(params)), strict=True
    ):
        g = _scaled(grad, grad_scale)
        if decoupled:
            p.mul_(1.0 - lr * weight_decay)
        elif weight_decay != 0.0:
            g = g + p * weight_decay
        m_now = m.to(torch.float32) * beta1 + g * (1.0 - beta1)
        v_now = v.to(torch.float32) * beta2 + (g * (1.0 - beta2)) * g
        m.copy_(m_now)
        v.copy_(v_now)
        p.add_((m_now * step_size) / (_sqrt(v_now) * inv_bias2_sqrt + eps))
        if copy is not None:
            copy.copy_(p)


def squared_norm_blocks(tensor: Tensor, block_numel: int = NORM_BLOCK_NUMEL) -> Tensor:
    """See `ds_core.kernels.squared_norm_blocks`."""
    if block_numel < 1:
        raise ValueError("squared_norm_blocks: block_numel must be positive")
    flat = tensor.detach().reshape(-1)
    blocks = -(-flat.numel() // block_numel)
    block_numel = min(block_numel, max(flat.numel(), 1))  # a single short block needs no padding
    rows = -(-block_numel // 16)
    wide = torch.zeros(blocks * block_numel, dtype=torch.float64, device=flat.device)
    wide[: flat.numel()] = flat
    squares = torch.zeros(blocks, rows * 16, dtype=torch.float64, device=flat.device)
    squares[:, :block_numel] = wide.view(blocks, block_numel).square()
    lanes = torch.zeros(blocks, 16, dtype=torch.float64, device=flat.device)
    for row in squares.view(blocks, rows, 16).unbind(1):  # in order: torch's own sum may add in any order
        lanes += row
    for half in (8, 4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
    return lanes[:, 0].contiguous()


def squared_norm(tensors: Sequence[Tensor]) -> tuple[float, bool]:
    """See `ds_core.kernels.squared_norm`."""
    total = 0.0
    for tensor in tensors:
        for block in squared_norm_blocks(tensor).tolist():
            total += block
    return total, math.isfinite(total)


@torch.no_grad()
def cast(src: Tensor | Sequence[Tensor], dst: Tensor | Sequence[Tensor]) -> None:
    """See `ds_core.kernels.cast`."""
    sources = [src] if isinstance(src, Tensor) else src
    destinations = [dst] if isinstance(dst, Tensor) else dst
    for a, b in zip(sources, destinations, strict=True):
        b.copy_(a.to(torch.float32))


@torch.no_grad()
def checksums(tensors: Sequence[Tensor], out: Sequence[Tensor]) -> Sequence[Tensor]:
    """See `ds_core.kernels.checksums`."""
    at_once = 1024  # blocks, whose words take 8 bytes each meanwhile
    for tensor, sums in zip(tensors, out, strict=True):
        data = tensor.detach().contiguous().view(-1)
        if not data.numel():
            continue
        for part, row in zip(data.split(at_once * CHECKSUM_BLOCK_NUMEL), sums.split(at_once), strict=True):
            row.copy_(_block_checksums(part, row.numel()))
    return out


def _block_checksums(part: Tensor, count: int) -> Tensor:
    block_bytes = CHECKSUM_BLOCK_NUMEL * part.element_size()
    padded = torch.zeros(count * block_bytes, dtype=torch.uint8, device=part.device)  # at an aligned address
    padded[: part.nbytes] = part.view(torch.uint8)
    words = padded.view(torch.int32).to(torch.int64).bitwise_and_(0xFFFFFFFF)
    index = torch.arange(block_bytes // 4, dtype=torch.int64, device=part.device)
    weights = ((2 * index + 1) * CHECKSUM_FACTOR).bitwise_and_(0xFFFFFFFF)
    return words.view(count, -1).mul_(weights).sum(1)  # torch's int64 wraps at 2^64


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def crc32c(data: Tensor | bytes | bytearray | memoryview, crc: int = 0) -> int:
    """See `ds_core.kernels.crc32c`; byte by byte, some 10^7 bytes/s."""
    table = _crc32c_table()
    if isinstance(data, Tensor):
        data = data.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()
    crc ^= 0xFFFFFFFF
    for byte in memoryview(data).cast("B"):
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _decayed(grad: Tensor, grad_scale: float, param: Tensor, weight_decay: float) -> Tensor:
    g = _scaled(grad, grad_scale)
    return g + param * weight_decay if weight_decay != 0.0 else g


def _finish(param: Tensor, change: Tensor, copy: Tensor | None) -> None:
    param.add_(change)
    if copy is not None:
        copy.copy_(param)


@torch.no_grad()
def adagrad_step(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    out: Sequence[Tensor | None] | None = None,
) -> None:
    """See `ds_core.kernels.adagrad_step`."""
    minus_lr = -lr / (1.0 + (step - 1) * lr_decay)
    for p, s, grad, copy in zip(params, sums, grads, _outs(out, len(params)), strict=True):
        g = _decayed(grad, grad_scale, p, weight_decay)
        s_now = s.to(torch.float32) + g * g
        s.copy_(s_now)
        _finish(p, (g * minus_lr) / (_sqrt(s_now) + eps), copy)


@torch.no_grad()
def lion_step(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    out: Sequence[Tensor | None] | None = None,
) -> None:
    """See `ds_core.kernels.lion_step`."""
    for p, m, grad, copy in zip(params, exp_avgs, grads, _outs(out, len(params)), strict=True):
        g = _scaled(grad, grad_scale)
        m_old = m.to(torch.float32)
        direction = torch.sign(m_old * beta1 + g * (1.0 - beta1))
        m.copy_(m_old * beta2 + g * (1.0 - beta2))
        p.mul_(1.0 - lr * weight_decay)
        _finish(p, direction * -lr, copy)


@torch.no_grad()
def sgd_step(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    *,
    first: bool,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    grad_scale: float = 1.0,
    out: Sequence[Tensor | None] | None = None,
) -> None:
    """See `ds_core.kernels.sgd_step`."""
    buffers: Sequence[Tensor | None] = (
        momentum_buffers if momentum_buffers is not None else [None] * len(params)
    )
    for p, buffer, grad, copy in zip(params, buffers, grads, _outs(out, len(params)), strict=True):
        g = _decayed(grad, grad_scale, p, weight_decay)
        if momentum != 0.0 and buffer is not None:
            b = g if first else buffer.to(torch.float32) * momentum + g * (1.0 - dampening)
            buffer.copy_(b)
            g = g + b * momentum if nesterov else b
        _finish(p, g * -lr, copy)


def _lamb_direction(
    p: Tensor, m: Tensor, v: Tensor, step: int, betas: tuple[float, float], eps: float, weight_decay: float
) -> Tensor:
    inv_bias1 = 1.0 / (1.0 - betas[0] ** step)
    inv_bias2_sqrt = 1.0 / math.sqrt(1.0 - betas[1] ** step)
    root = _sqrt(v.to(torch.float32)) * inv_bias2_sqrt + eps
    return (m.to(torch.float32) * inv_bias1) / root + p * weight_decay


@torch.no_grad()
def lamb_moments(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> Tensor:
    """See `ds_core.kernels.lamb_moments`."""
    norms = torch.zeros(len(params), 2, dtype=torch.float64)
    for i, (p, m, v, grad) in enumerate(zip(params, exp_avgs, exp_avg_sqs, grads, strict=True)):
        g = _scaled(grad, grad_scale)
        m.copy_(m.to(torch.float32) * beta1 + g * (1.0 - beta1))
        v.copy_(v.to(torch.float32) * beta2 + (g * (1.0 - beta2)) * g)
        u = _lamb_direction(p, m, v, step, (beta1, beta2), eps, weight_decay)
        norms[i, 0] = squared_norm([p])[0]
        norms[i, 1] = squared_norm([u])[0]
    return norms


@torch.no_grad()
def lamb_apply(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    ratios: Sequence[float],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    out: Sequence[Tensor | None] | None = None,
) -> None:
    """See `ds_core.kernels.lamb_apply`."""
    copies = _outs(out, len(params))
    for p, m, v, ratio, copy in zip(params, exp_avgs, exp_avg_sqs, ratios, copies, strict=True):
        u = _lamb_direction(p, m, v, step, (beta1, beta2), eps, weight_decay)
        _finish(p, u * (-lr * ratio), copy)


def pack_signs(x: Tensor, bits: Tensor | None = None) -> tuple[Tensor, float]:
    """See `ds_core.kernels.pack_signs`."""
    flat = x.detach().reshape(-1).to(torch.float32)
    count = -(-flat.numel() // 8)
    padded = torch.zeros(count * 8, dtype=torch.uint8, device=x.device)
    padded[: flat.numel()] = torch.signbit(flat)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=x.device)
    packed = (padded.view(count, 8) * weights).sum(1, dtype=torch.uint8)
    if bits is not None:
        packed = bits.copy_(packed)
    return packed, float(flat.to(torch.float64).abs().sum()) / max(flat.numel(), 1)


@torch.no_grad()
def unpack_signs(bits: Tensor, scale: float, out: Tensor) -> Tensor:
    """See `ds_core.kernels.unpack_signs`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    negative = (bits.view(-1, 1) >> shifts & 1).view(-1)[: out.numel()].to(torch.bool)
    scales = torch.tensor([scale, -scale], dtype=torch.float32, device=out.device)
    return out.copy_(scales[negative.to(torch.int64)].view(out.shape))
