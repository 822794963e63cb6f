"""Functions that torch.compile does not trace.

`torch.compiler.disable` has the same effect, but it imports the whole compiler, which would add seconds to the start of
every program.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._C._dynamo import eval_frame

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """Returns `function` as a function that torch.compile does not trace."""

    @functools.wraps(function)
    def hidden(*args: P.args, **kwargs: P.kwargs) -> R:
        compiler = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(compiler)

    vars(hidden).update(
        _torchdynamo_disable=True, _torchdynamo_disable_msg="ds_offload moves activations here"
    )
    _skip(hidden)
    return hidden


def _skip(function: object) -> None:
    """Excludes the wrapper itself from tracing, where this version of torch can do that."""
    strategy = getattr(eval_frame, "_FrameExecStrategy", None)
    action = getattr(eval_frame, "_FrameAction", None)
    code = getattr(function, "__code__", None)
    if strategy is not None and action is not None and isinstance(code, types.CodeType):
        eval_frame.set_code_exec_strategy(code, strategy(action.SKIP, action.DEFAULT))
