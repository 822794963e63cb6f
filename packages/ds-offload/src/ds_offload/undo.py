"""Steps that can be taken back: copies of parameters and states from before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_core import arena
from ds_offload.paging.tensors import local


@dataclass(frozen=True)
class _Before:
    """What a parameter had before its last step."""

    values: Tensor | None
    """None: the parameter was not logged."""
    state: dict[str, Any] | None
    """None: it had no state."""


class UndoLog:
    """Copies of parameters and of their states, taken before a step.

    Memory is kept for the next step, since allocating it again would be slow. `close` frees it.
    """

    def __init__(self) -> None:
        self._before: dict[Tensor, _Before] = {}
        self._memory: dict[tuple[Tensor, str], Tensor] = {}

    def record(self, param: Tensor, state: dict[str, Any] | None, *, with_values: bool) -> None:
        """Copies a parameter and its states, in place of an earlier copy.

        Args:
            state: name -> tensor or number; None or empty: the parameter has no states.
            with_values: copy the parameter, too.
        """
        values = self._copied(param, "", local(param)) if with_values else None
        kept = {
            name: self._copied(param, name, local(value)) if isinstance(value, Tensor) else value
            for name, value in (state or {}).items()
        }
        self._before[param] = _Before(values, kept or None)

    def take(self, params: Sequence[Tensor] | None) -> list[tuple[Tensor, _Before]]:
        """Removes and returns what is logged of `params`; of all parameters if None."""
        chosen = list(self._before) if params is None else [p for p in params if p in self._before]
        return [(param, self._before.pop(param)) for param in chosen]

    def clear(self) -> None:
        """Forgets what is logged. The memory is kept."""
        self._before.clear()

    def close(self) -> None:
        """Forgets everything and frees the memory."""
        self._before.clear()
        self._memory.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def _copied(self, param: Tensor, name: str, value: Tensor) -> Tensor:
        held = self._memory.get((param, name))
        if held is None or held.shape != value.shape or held.dtype != value.dtype:
            held = self._memory[param, name] = _memory_like(value)
        return held.copy_(value)


def _memory_like(value: Tensor) -> Tensor:
    if value.device.type == "cpu" and value.numel() and torch.ops.aten.is_non_overlapping_and_dense(value):
        return arena.empty(value.numel(), value.dtype).as_strided(value.size(), value.stride())
    return torch.empty_like(value)


def put_back(param: Tensor, before: _Before) -> None:
    """Gives a parameter its logged values, if it was logged."""
    if before.values is not None:
        with torch.no_grad():
            local(param).copy_(before.values)


class Undoable(Optimizer):
    """A mixin for optimizers with `step_fused` whose states are in memory: steps that can be taken back.

    ::

        optimizer.step_undoable(params, grad_scale=torch.ones(()), out=[None] * len(params))
        optimizer.rollback()        # parameters and states are as before, bit for bit
        # or
        optimizer.commit()          # the step stays
    """

    @property
    def _undo_log(self) -> UndoLog:
        # Made at its first use, so that a copied or unpickled optimizer needs no attribute.
        made: UndoLog = self.__dict__.setdefault("_undo_log_", UndoLog())
        return made

    def undo_bytes(self, params: Sequence[Tensor], *, with_values: bool = True) -> int:
        """Returns the bytes that the log of one step of `params` needs. Before their first step, states are not
        counted, since there are none to copy.
        """
        return sum(_log_bytes(p, self.state.get(p), with_values) for p in params if p.grad is not None)

    def step_undoable(
        self,
        params: Sequence[Tensor],
        *,
        grad_scale: Tensor,
        out: Sequence[Tensor | None],
        with_values: bool = True,
    ) -> None:
        """Steps `params` as `step_fused` does, so that `rollback` can take the step back. If a parameter was stepped by
        this method before, the earlier step becomes final.

        Args:
            with_values: log the parameters. If False, the caller restores them, and `rollback` only their states.
        """
        for param in params:
            if param.grad is not None:
                self._undo_log.record(param, self.state.get(param), with_values=with_values)
        step: Any = self
        step.step_fused(params, grad_scale=grad_scale, out=out)

    @torch.no_grad()
    def rollback(self, params: Sequence[Tensor] | None = None) -> None:
        """Takes back the last `step_undoable` of each of `params`; of all parameters if None. What was written to `out`
        stays. Parameters whose step is final are left as they are.
        """
        for param, before in self._undo_log.take(params):
            put_back(param, before)
            if before.state is None:
                self.state.pop(param, None)
                continue
            state = self.state[param]
            for name in state.keys() - before.state.keys():
                del state[name]
            for name, value in before.state.items():
                held = state.get(name)
                if isinstance(value, Tensor) and isinstance(held, Tensor) and held.shape == value.shape:
                    local(held).copy_(value)
                else:
                    state[name] = value.clone() if isinstance(value, Tensor) else value

    def commit(self) -> None:
        """Makes all steps final. The memory of the log is kept for the next ones."""
        self._undo_log.clear()


def _log_bytes(param: Tensor, state: dict[str, Any] | None, with_values: bool) -> int:
    tensors = [local(v) for v in (state or {}).values() if isinstance(v, Tensor)]
    if with_values:
        tensors.append(local(param))
    return sum(t.nbytes for t in tensors)
