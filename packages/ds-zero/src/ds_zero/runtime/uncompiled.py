"""Functions that torch.compile does not look into.

[Note: outside of graphs]
Hooks gather, wait and resize storages, which no graph may contain. A compiled model breaks its graph before
each of them, runs it as it is, and goes on; so graphs lie between the hooks, where parameters have their
values. `torch.compiler.disable` does the same, but imports the whole compiler, which takes seconds, into every
program.
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
    """`function`, run without the compiler, called or compiled."""

    @functools.wraps(function)
    def hidden(*args: P.args, **kwargs: P.kwargs) -> R:
        compiler = eval_frame.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            eval_frame.set_eval_frame(compiler)

    marks = vars(hidden)
    marks.update(_torchdynamo_disable=True, _torchdynamo_disable_msg="ds_zero gathers parameters here")
    _skip(hidden)
    return hidden


def _skip(function: object) -> None:
    """Keep the compiler from looking at the wrapper itself; where torch has no way to say so, it finds an
    uncompilable line there, which costs a second once.
    """
    strategy = getattr(eval_frame, "_FrameExecStrategy", None)
    action = getattr(eval_frame, "_FrameAction", None)
    code = getattr(function, "__code__", None)
    if strategy is not None and action is not None and isinstance(code, types.CodeType):
        eval_frame.set_code_exec_strategy(code, strategy(action.SKIP, action.DEFAULT))
