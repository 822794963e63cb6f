"""Records the calls of torch.distributed's functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ds_comm.log.comms_log import CommsLog
from ds_comm.torch_functions import OPERATIONS, WrappedFunctions, group_among


class TorchCalls:
    """While it exists, calls of `torch.distributed.all_reduce` and its like are recorded. `close` ends it."""

    def __init__(self, log: CommsLog) -> None:
        self._log: CommsLog | None = log
        self._functions = WrappedFunctions(OPERATIONS, self._wrapped)

    def close(self) -> None:
        """Records nothing any more. Safe to call twice."""
        self._log = None
        self._functions.close()

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            log = self._log
            ranks = 0 if log is None else _ranks(args, kwargs)
            if log is None or ranks <= 0:  # not a member of the group: torch does nothing
                return function(*args, **kwargs)
            end = log.begin(name, _num_bytes(name, args, kwargs), ranks)
            if end is None:
                return function(*args, **kwargs)
            with log.inside():
                result = function(*args, **kwargs)
            sent_bytes = 0 if name in ("recv", "irecv") else None
            if name == "all_to_all_single":
                sent_bytes = _sent_bytes(*args, **kwargs)
            _at_end(result, functools.partial(end, sent_bytes))
            return result

        return call


def watch_torch(log: CommsLog) -> TorchCalls:
    """Records the calls of torch.distributed's functions in `log`, until `close` is called on the result."""
    return TorchCalls(log)


def _ranks(args: Iterable[Any], kwargs: dict[str, Any]) -> int:
    """Returns the number of ranks of the group among the arguments; -1 if this rank is not in it."""
    if not dist.is_initialized():
        return 0
    return dist.get_world_size(group_among((*args, *kwargs.values())))


def _num_bytes(name: str, args: Iterable[Any], kwargs: dict[str, Any]) -> int:
    """Returns the bytes of the largest tensor, or list of tensors, among the arguments."""
    if name == "batch_isend_irecv":
        operations = kwargs["p2p_op_list"] if "p2p_op_list" in kwargs else next(iter(args))
        return sum(operation.tensor.nbytes for operation in operations if operation.op == dist.isend)
    return max((_bytes_of(x) for x in (*args, *kwargs.values())), default=0)


def _sent_bytes(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Any = None,
    *_: Any,
    **__: Any,
) -> int | None:
    """Returns what `all_to_all_single` sends to other ranks, with its arguments; None: the same to each."""
    if not input_split_sizes:
        return None
    kept = input_split_sizes[dist.get_rank(group)] / max(1, sum(input_split_sizes))
    return round(input.nbytes * (1 - kept))


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(x.nbytes for x in value if isinstance(x, Tensor))
    return 0


def _at_end(result: Any, end: Callable[..., None]) -> None:
    """Calls `end` when the operation has ended: at once if it is not asynchronous, and never if that is not told."""
    works = result if isinstance(result, list) else [result]
    if not all(isinstance(work, dist.Work) for work in works) or not works:
        end()
        return
    try:
        futures = [work.get_future() for work in works]
    except (RuntimeError, NotImplementedError):  # gloo's reduce-scatter and messages have none
        end(seen=False)
        return
    remaining = [None] * len(futures)

    def ended(_: Any) -> None:
        remaining.pop()
        if not remaining:
            end()

    for future in futures:
        future.add_done_callback(ended)
