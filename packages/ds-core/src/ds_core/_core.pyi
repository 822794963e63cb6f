from collections.abc import Sequence
from typing import Any

from torch import Tensor

version: str

class Block:
    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def cpu_target() -> str: ...
def available_cpu_targets() -> list[str]: ...
def set_cpu_target(name: str) -> None: ...
def thread_source() -> str: ...
def arena_stats() -> tuple[int, int, int, bool]: ...
def gpu_open(path: str) -> None: ...
def gpu_num_devices() -> int: ...
def adam_step(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    out: Sequence[Tensor | None] | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    grad_scale: float,
    threads: int,
    /,
) -> None: ...
def adagrad_step(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    out: Sequence[Tensor | None] | None,
    step: int,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    threads: int,
    /,
) -> None: ...
def lion_step(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    grads: Sequence[Tensor],
    out: Sequence[Tensor | None] | None,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    grad_scale: float,
    threads: int,
    /,
) -> None: ...
def sgd_step(
    params: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    out: Sequence[Tensor | None] | None,
    first: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    grad_scale: float,
    threads: int,
    /,
) -> None: ...
def lamb_moments(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums: Tensor,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    threads: int,
    /,
) -> None: ...
def lamb_apply(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    out: Sequence[Tensor | None] | None,
    ratios: Sequence[float],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    threads: int,
    /,
) -> None: ...
def read_counts(counts: Sequence[Tensor], /) -> list[int] | None: ...
def advance_counts(counts: Sequence[Tensor], /) -> bool: ...
def squared_norm(tensors: Sequence[Tensor], threads: int, /) -> tuple[float, bool]: ...
def squared_norm_blocks(tensor: Tensor, block_numel: int, out: Tensor, threads: int, /) -> None: ...
def cast(src: Sequence[Tensor], dst: Sequence[Tensor], threads: int, /) -> None: ...
def crc32c(buffer: Any, crc: int, threads: int, /) -> int: ...
def pack_signs(x: Tensor, bits: Tensor, block_sums: Tensor, threads: int, /) -> float: ...
def unpack_signs(bits: Tensor, scale: float, out: Tensor, threads: int, /) -> None: ...
