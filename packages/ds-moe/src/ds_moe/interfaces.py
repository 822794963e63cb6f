"""The protocols of this package, in torch types only. Other packages implement them without importing it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """An asynchronous operation; `wait` returns when its result may be used."""

    def wait(self) -> object: ...


@runtime_checkable
class CountedWork(Protocol):
    """A `Work` that knows what was sent, where that is not what was to be sent: encoded rows, or rows in two hops."""

    sent_bytes: int
    """Bytes that this rank has sent to other ranks; complete after `wait`."""

    def wait(self) -> object: ...


class AllToAll(Protocol):
    """Exchanges rows among the ranks of an expert-parallel group; `torch.distributed.all_to_all_single` is one,
    and those of `ds_comm.exchange.rows` are others.
    """

    def __call__(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        group: dist.ProcessGroup,
        async_op: bool,
    ) -> Work:
        """Sends `input_split_sizes[r]` rows of `input` to rank r, and writes what rank r sends to `output`, in the
        order of ranks. Sizes may be 0. Called with rows in forward, and with gradients of rows in backward.
        """
