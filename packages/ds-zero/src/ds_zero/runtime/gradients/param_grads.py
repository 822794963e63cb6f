"""The value of `param.grad` of a sharded model between two backwards.

[Note: what param.grad shows]
Backward sets `param.grad`, and the reduction moves the gradients to the optimizer's shards. If `param.grad` were None
afterwards, `torch.nn.utils.clip_grad_norm_(model.parameters())` would compute a norm of 0 and clip nothing, and an
optimizer that was created over the parameters would update nothing, both without an error. So `param.grad` is set to a
placeholder tensor without memory (`tensors.placeholder.ReducedGradient`), which raises when it is used. It is removed
when the next backward begins, because autograd stores a gradient without a copy only if `param.grad` is None.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence

from torch import Tensor, nn

from ds_zero.runtime.bucket import Bucket
from ds_zero.tensors.placeholder import ReducedGradient
from ds_zero.tensors.storage import is_fake

_EXPLANATION = (
    "param.grad of a model that is sharded by ds_zero has no values: the gradient was reduced to the optimizer's "
    "shard. To clip, call ds_zero.clip_grad_norm_(model, max_norm) instead of torch's function. To read the gradient, "
    "call ds_zero.get_full(model, name, 'grad'). To step, use the optimizer that was passed to ds_zero.shard; another "
    "optimizer over the same parameters updates nothing. If ds_zero.shard was called without an optimizer, pass it to "
    "ds_zero.shard_optimizer"
)


class ShownGradient(enum.Enum):
    """The value of `param.grad` after a backward."""

    HANDLE = "handle"
    """A placeholder without memory, whose error says how to access the gradient."""
    NOTHING = "nothing"
    """None, as in DeepSpeed at stages 1 to 3."""
    REDUCED = "reduced"
    """The mean over ranks, if every rank has the complete reduced gradient (stage 0); else None. The next step uses the
    changes that are made to it."""


class ParamGrads:
    """Removes the gradients that autograd leaves on the parameters of `buckets`, and sets `param.grad` in their place,
    [Note: what param.grad shows].
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.shown = ShownGradient.HANDLE
        self.are_reduced = False
        """Whether the gradients on the optimizer's shards are complete after the backward that has just ended."""
        self._buckets = [b for b in buckets if b.trainable]
        self._has_values = not any(is_fake(b.full) for b in buckets)
        self._handles: dict[int, ReducedGradient] = {}
        self._taken: dict[int, nn.Parameter] = {}
        """Parameters whose gradients the present backward has computed."""
        self._showing: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        """(parameter, the tensor that was set as `param.grad`, the shard whose gradient it is a view of)."""

    def take(self, param: nn.Parameter) -> Tensor:
        """Returns the gradient that autograd has just stored in `param.grad`, and sets that to None."""
        grad = param.grad
        assert grad is not None
        param.grad = None
        self._taken[id(param)] = param
        return grad.take_arrived() if isinstance(grad, ReducedGradient) else grad

    def show(self) -> None:
        """Sets `param.grad`, after a backward."""
        taken, self._taken = self._taken, {}
        if not self._has_values or self.shown is ShownGradient.NOTHING:
            return
        if self.shown is ShownGradient.REDUCED:
            if self.are_reduced:
                self._show_reduced()
            return
        for param in taken.values():
            if param.grad is None:
                param.grad = handle = self._handle(param)
                self._showing.append((param, handle, None))

    def _handle(self, param: nn.Parameter) -> ReducedGradient:
        handle = self._handles.get(id(param))
        if handle is None:
            handle = self._handles[id(param)] = ReducedGradient.like(param, _EXPLANATION)
        return handle

    def _show_reduced(self) -> None:
        for bucket in self._buckets:
            if not bucket.whole or bucket.layout.num_owners > 1:
                continue
            for param, shard in zip(bucket.params, bucket.shards, strict=True):
                if shard.grad is not None and param.grad is None:
                    if shard.grad.dtype != param.dtype:
                        param.grad_dtype = None
                    param.grad = view = shard.grad.view(param.shape)
                    self._showing.append((param, view, shard))

    def showing(self) -> list[nn.Parameter]:
        """Parameters whose `grad` was set by `show`, even if the user has replaced or removed it since."""
        return [param for param, _, _ in self._showing]

    def stepped(self) -> None:
        """Removes reduced gradients from the parameters, after a step has used them."""
        if self.shown is ShownGradient.REDUCED:
            for param, _, _ in self._showing:
                param.grad = None  # also a gradient that the user has assigned: the step has used it
            self._showing.clear()

    def forget(self) -> None:
        """Sets `param.grad` of all parameters to None."""
        self._showing.clear()
        self._taken.clear()
        for bucket in self._buckets:
            for param in bucket.params:
                param.grad = None

    def clear(self) -> None:
        """Removes what `show` has set; a gradient that the user has assigned stays."""
        showing, self._showing = self._showing, []
        for param, shown, _ in showing:
            if param.grad is shown:
                param.grad = None

    def remove_for_compiler(self) -> None:
        """Removes placeholders before a forward that torch.compile may trace, since its tracing reads properties of
        `param.grad` for which a placeholder raises. The next backward sets them again.
        """
        if self.shown is ShownGradient.HANDLE and "torch._dynamo" in sys.modules:
            self.clear()

    def adopt(self) -> None:
        """Copies gradients that the user has replaced to the optimizer's shards, and drops those that were removed."""
        for param, shown, shard in self._showing:
            if shard is None or param.grad is shown:
                continue
            if param.grad is None:
                shard.grad = None
            elif shard.grad is not None:
                shard.grad.copy_(param.grad.reshape(shard.grad.shape))
