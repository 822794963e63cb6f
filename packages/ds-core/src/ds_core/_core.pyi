from collections.abc import Sequence
from typing import Any

from torch import Tensor

version: str

class Block:
    def __init__(self, size: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class LockedBlock:
    def __init__(self, size: int, by_device: bool) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def locked_bytes() -> int: ...

class IoFile:
    @property
    def num_bytes(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def direct(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def offset_alignment(self) -> int: ...
    @property
    def memory_alignment(self) -> int: ...
    def close(self) -> None: ...

IoFacts = tuple[int, int, int, int, str, bool, int, int]

class IoWork:
    def done(self) -> bool: ...
    def wait(self, timeout_s: float | None, /) -> tuple[bool, IoFacts]: ...

class IoEngine:
    def __init__(
        self,
        backend: str,
        block_bytes: int,
        queue_depth: int,
        num_threads: int,
        direct: bool,
        stall_limit_s: float,
        /,
    ) -> None: ...
    @property
    def backend(self) -> str: ...
    @property
    def reason(self) -> str: ...
    def open(
        self, path: str, create: bool, exclusive: bool, read_only: bool, num_bytes: int, /
    ) -> IoFile: ...
    def submit(self, write: bool, file: IoFile, tensor: Tensor, offset: int, /) -> IoWork: ...
    def wait_all(self, timeout_s: float | None, /) -> bool: ...
    def wait_file(self, file: IoFile, timeout_s: float | None, /) -> bool: ...
    def unseen_failures(self, file: IoFile | None, /) -> list[IoFacts]: ...
    def register_memory(self, tensor: Tensor, /) -> str: ...
    def forget_memory(self, tensor: Tensor, /) -> None: ...
    def in_process_of_creation(self) -> bool: ...
    def release_done(self) -> None: ...
    def stop(self) -> bool: ...

def io_uring_reason() -> str: ...
def _io_set_faults(faults: Sequence[tuple[str, int, int, int, int, bool]], /) -> None: ...
def cpu_target() -> str: ...
def available_cpu_targets() -> list[str]: ...
def set_cpu_target(name: str) -> None: ...
def compute_on(cores: Sequence[int], /) -> list[int]: ...
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
    checksums: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    formats: tuple[Sequence[Tensor | None] | None, int | None, bool] | None,
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
    checksums: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    formats: tuple[Sequence[Tensor | None] | None, int | None, bool] | None,
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
    checksums: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    formats: tuple[Sequence[Tensor | None] | None, int | None, bool] | None,
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
    checksums: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
    formats: tuple[Sequence[Tensor | None] | None, int | None, bool] | None,
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
def checksums(tensors: Sequence[Tensor], out: Sequence[Tensor], threads: int, /) -> None: ...
def crc32c(buffer: Any, crc: int, threads: int, /) -> int: ...
def block_attention_forward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    sizes: tuple[int, int, int, int, int, int],
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    threads: int,
    /,
) -> None: ...
def block_attention_backward(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
    sizes: tuple[int, int, int, int, int, int],
    scale: float,
    causal: bool,
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    threads: int,
    /,
) -> None: ...
def grouped_feed_forward(
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    sizes: Sequence[int],
    hidden: int,
    inner: int,
    activation: int,
    inner_values: tuple[Tensor | None, ...],
    out: Tensor,
    threads: int,
    /,
) -> None: ...
def grouped_feed_forward_grad(
    grad: Tensor,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    sizes: Sequence[int],
    hidden: int,
    inner: int,
    activation: int,
    inner_values: tuple[Tensor | None, ...],
    inner_grads: tuple[Tensor | None, ...],
    dx: tuple[Tensor | None, ...],
    weight_grads: tuple[Tensor | None, ...],
    threads: int,
    /,
) -> None: ...
def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    inputs: int,
    outputs: int,
    out: Tensor,
    threads: int,
    /,
) -> None: ...
def grouped_linear_grad_input(
    grad: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    inputs: int,
    outputs: int,
    dx: Tensor,
    threads: int,
    /,
) -> None: ...
def grouped_linear_grad_weight(
    grad: Tensor,
    x: Tensor,
    sizes: Sequence[int],
    inputs: int,
    outputs: int,
    dw: Tensor,
    dbias: Tensor | None,
    threads: int,
    /,
) -> None: ...
def row_sums(
    rows: Tensor,
    index: Tensor,
    choices: int,
    columns: int,
    weights: Tensor | None,
    out: Tensor,
    threads: int,
    /,
) -> None: ...
def row_sums_grad(
    grad: Tensor,
    rows: Tensor,
    index: Tensor,
    choices: int,
    columns: int,
    weights: Tensor,
    drows: Tensor,
    dweights: Tensor,
    threads: int,
    /,
) -> None: ...
def pack_signs(x: Tensor, bits: Tensor, block_sums: Tensor, threads: int, /) -> float: ...
def unpack_signs(bits: Tensor, scale: float, out: Tensor, threads: int, /) -> None: ...

same_host_max_ranks: int

def same_host_segment(num_ranks: int, /) -> int: ...
def same_host_reaches(pid: int, address: int, token: int, /) -> bool: ...

SameHostFacts = tuple[int, int, int, int, int, int, int, int]

class SameHostTeam:
    def __init__(self, segment: int, rank: int, pids: list[int], limit_s: float) -> None: ...
    def barrier(self) -> SameHostFacts: ...
    def all_reduce(self, tensor: Tensor, element: int, op: int, /) -> SameHostFacts: ...
    def reduce_scatter(self, output: Tensor, input: Tensor, element: int, op: int, /) -> SameHostFacts: ...
    def all_gather(self, output: Tensor, input: Tensor, sizes: list[int], /) -> SameHostFacts: ...
    def broadcast(self, tensor: Tensor, root: int, /) -> SameHostFacts: ...
    def all_to_all(
        self, output: Tensor, output_sizes: list[int], input: Tensor, input_sizes: list[int], /
    ) -> SameHostFacts: ...
    def leave(self) -> None: ...

def sign_encode(
    x: Tensor, residual: Tensor | None, blocks: Tensor, scales: Tensor, codes: Tensor, threads: int, /
) -> None: ...
def sign_decode(
    scales: Tensor, codes: Tensor, blocks: Tensor, out: Tensor, weight: float, add: bool, threads: int, /
) -> None: ...
def int_encode(
    x: Tensor,
    residual: Tensor | None,
    blocks: Tensor,
    scales: Tensor,
    codes: Tensor,
    bits: int,
    stochastic: bool,
    seed: int,
    threads: int,
    /,
) -> None: ...
def int_decode(
    scales: Tensor,
    codes: Tensor,
    blocks: Tensor,
    out: Tensor,
    bits: int,
    weight: float,
    add: bool,
    threads: int,
    /,
) -> None: ...
