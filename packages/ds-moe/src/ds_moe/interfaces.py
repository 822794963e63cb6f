"""The protocols of this package, in torch types only. Other packages implement them without importing it."""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """An asynchronous operation; `wait` returns when its result may be used."""

    def wait(self) -> object: ...


class AllToAll(Protocol):
    """Exchanges rows among the ranks of an expert-parallel group; `torch.distributed.all_to_all_single` is one."""

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
        order of ranks. Sizes may be 0.
        """
