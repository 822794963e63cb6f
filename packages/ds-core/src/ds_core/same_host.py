"""Collectives between processes of one machine, through shared memory: [Note: same-host collectives] in
`cpp/include/ds/same_host.h`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ds_core import _native

Reduction = Literal["sum", "mean", "max", "min"]

_KINDS = ("barrier", "all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all")
_REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "max", "min")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
"""Dtypes that can be reduced, in the order of `Element`."""
_BYTES = len(_DTYPES)

Facts = tuple[int, int, int, int, int, int, int, int]
"""Fault, rank, errno; then kind, element, reduction, root and bytes of the call of that rank."""


class SameHostError(RuntimeError):
    """A collective failed, and the team cannot be used any more."""

    rank: int | None = None
    """The rank of the team that is named in the message."""


def is_available() -> bool:
    """Whether this system has what teams need: Linux, and the native module."""
    return _native.has_native() and hasattr(os, "pidfd_open")


def new_segment(num_ranks: int) -> int:
    """Returns a file descriptor of the shared memory for a team. The caller closes it.

    Raises:
        OSError: the system refuses it.
    """
    return _native.core.same_host_segment(num_ranks)


def reaches(pid: int, address: int, token: int) -> bool:
    """Whether this process can read the memory of process `pid`, and the 8 bytes at `address` are `token`."""
    return _native.core.same_host_reaches(pid, address, token)


class Team:
    """The ranks of one machine. All make the same calls in the same order. Tensors are contiguous and on the CPU.

    Sums are computed in the order of a fixed binary tree over ranks, those of bf16 and fp16 in fp32, so that all ranks
    get the same bits, and the same bits in every run.

    Args:
        segment: a file descriptor of the shared memory that one rank has made with `new_segment`.
        rank: this process.
        pids: the processes of all ranks, at most 64.
        limit_s: seconds after which a wait for another rank fails.

    Raises:
        OSError: the shared memory cannot be mapped, or a process does not exist.
    """

    def __init__(self, segment: int, rank: int, pids: Sequence[int], limit_s: float = 1800.0) -> None:
        if not 0 <= rank < len(pids) <= _native.core.same_host_max_ranks:
            raise ValueError(
                f"rank {rank} of {len(pids)} ranks: a team has at most {_native.core.same_host_max_ranks} ranks"
            )
        self._native = _native.core.SameHostTeam(segment, rank, list(pids), limit_s)
        self._pids, self._limit_s = list(pids), limit_s
        self.rank, self.size = rank, len(pids)

    def barrier(self) -> None:
        """Returns when all ranks have called it."""
        self._check(self._native.barrier(), "barrier")

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum") -> None:
        """Replaces `tensor` by the reduction over ranks."""
        element = _element(tensor, op)
        self._check(
            self._native.all_reduce(tensor, element, _REDUCTIONS.index(op)), _text("all_reduce", tensor, op)
        )

    def reduce_scatter(self, output: Tensor, input: Tensor, op: Reduction = "sum") -> None:
        """Fills `output` with this rank's slice of the reduction of `input`, which has the slices of all ranks."""
        element = _element(input, op)
        if output.dtype != input.dtype:
            raise ValueError(f"reduce_scatter: output is {output.dtype}, but input is {input.dtype}")
        facts = self._native.reduce_scatter(output, input, element, _REDUCTIONS.index(op))
        self._check(facts, _text("reduce_scatter", input, op))

    def all_gather(self, output: Tensor, input: Tensor, sizes: Sequence[int] | None = None) -> None:
        """Fills `output` with the tensors of all ranks. `input` may be this rank's part of it.

        Args:
            sizes: number of elements of each rank's tensor; None: the same for all.
        """
        width = input.element_size()
        counts = [input.numel()] * self.size if sizes is None else list(sizes)
        facts = self._native.all_gather(output, input, [count * width for count in counts])
        self._check(facts, _text("all_gather", output))

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Replaces `tensor` by that of rank `source`."""
        self._check(self._native.broadcast(tensor, source), _text("broadcast", tensor))

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_sizes: Sequence[int] | None = None,
        input_sizes: Sequence[int] | None = None,
    ) -> None:
        """Sends part p of `input` to rank p, and receives part p of `output` from it.

        Args:
            output_sizes, input_sizes: elements of each part; None: all parts have the same.
        """
        sent = self._parts(input, input_sizes, "input")
        received = self._parts(output, output_sizes, "output")
        self._check(self._native.all_to_all(output, received, input, sent), _text("all_to_all", input))

    def leave(self) -> None:
        """Ends all waits of this process for other ranks, and of other ranks for it. Later calls fail."""
        self._native.leave()

    def _parts(self, tensor: Tensor, sizes: Sequence[int] | None, name: str) -> list[int]:
        if sizes is None:
            if tensor.numel() % self.size:
                raise ValueError(
                    f"all_to_all: the {tensor.numel()} elements of {name} cannot be divided evenly among {self.size} "
                    f"ranks; pass {name}_sizes"
                )
            sizes = [tensor.numel() // self.size] * self.size
        return [size * tensor.element_size() for size in sizes]

    def _check(self, facts: Facts, doing: str) -> None:
        fault, rank, code = facts[:3]
        if fault == 0:
            return
        pid = self._pids[rank]
        message = {
            1: f"rank {rank} of the team is gone: its process {pid} has ended",
            2: f"rank {rank} of the team has left it"
            + (f" after a failure of rank {code}" if code >= 0 else ": it was closed, or told to end"),
            3: f"rank {rank} calls {_their_call(facts)}: the ranks run different programs or configurations",
            4: f"rank {rank} has not come within {self._limit_s:g} s",
            5: f"the memory of rank {rank}, process {pid}, cannot be read: {os.strerror(max(code, 0))}",
            6: "this rank has left the team",
        }[fault]
        error = SameHostError(f"{doing} on rank {self.rank}: {message}")
        error.rank = code if fault == 2 and code >= 0 else rank
        raise error


def _element(tensor: Tensor, op: str) -> int:
    if op not in _REDUCTIONS:
        raise ValueError(f"op is one of {', '.join(_REDUCTIONS)}, but is {op!r}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"tensors of {tensor.dtype} cannot be reduced; there are {', '.join(map(str, _DTYPES))}"
        )
    if op == "mean" and not tensor.dtype.is_floating_point:
        raise ValueError(f'op "mean" needs a floating-point tensor, but this one is {tensor.dtype}')
    return _DTYPES.index(tensor.dtype)


def _text(kind: str, tensor: Tensor, op: str = "") -> str:
    return f"{kind}{f' ({op})' if op else ''} of {tensor.nbytes} bytes of {str(tensor.dtype).removeprefix('torch.')}"


def _their_call(facts: Facts) -> str:
    kind, element, op, root, num_bytes = facts[3:]
    name = _KINDS[kind]
    if name in ("all_reduce", "reduce_scatter"):
        dtype = str(_DTYPES[element]).removeprefix("torch.") if element < _BYTES else "bytes"
        return f"{name} ({_REDUCTIONS[op]}) of {num_bytes} bytes of {dtype}"
    if name == "broadcast":
        return f"broadcast of {num_bytes} bytes from rank {root}"
    return name if name == "barrier" else f"{name} of {num_bytes} bytes"
