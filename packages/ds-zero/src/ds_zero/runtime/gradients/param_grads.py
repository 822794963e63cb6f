"""What `param.grad` of a sharded model shows between two backwards.

[Note: what param.grad shows]
Backward leaves gradients on parameters, and reduction moves them to the optimizer's shards. Were `param.grad` None
afterwards, `torch.nn.utils.clip_grad_norm_(model.parameters())` would measure 0 and clip nothing, and an optimizer made
over the parameters would step without a gradient: both in silence. So a parameter whose gradient was taken shows a
handle without memory (`handle.ReducedGradient`), which raises when it is used. It is removed when the next backward
begins, since autograd takes over a gradient without a copy only where there is none.
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
    "param.grad of a model that ds_zero shards has no values: the gradient was reduced onto the optimizer's shard. "
    "To clip, call ds_zero.clip_grad_norm_(model, max_norm) instead of torch's; to read it, "
    "ds_zero.get_full(model, name, 'grad'); to step, use the optimizer that ds_zero.shard was given (one that was made "
    "over the parameters afterwards trains nothing; pass it to ds_zero.shard_optimizer where ds_zero.shard had none)"
)


class ShownGradient(enum.Enum):
    """What `param.grad` is after a backward."""

    HANDLE = "handle"
    """A tensor without memory that explains itself."""
    NOTHING = "nothing"
    """None, as in DeepSpeed at stages 1 to 3."""
    REDUCED = "reduced"
    """The mean over ranks, where every rank has all of it (stage 0) and it is complete, else None. A change of it
    counts in the next step."""


class ParamGrads:
    """Takes gradients off the parameters of `buckets`, and shows something in their place, [Note: what param.grad
    shows].
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.shown = ShownGradient.HANDLE
        self.are_reduced = False
        """Whether the gradients of the backward that has just ended are complete on the optimizer's shards."""
        self._buckets = [b for b in buckets if b.trainable]
        self._has_values = not any(is_fake(b.full) for b in buckets)
        self._handles: dict[int, ReducedGradient] = {}
        self._taken: dict[int, nn.Parameter] = {}
        """Parameters whose gradients the present backward has produced."""
        self._showing: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        """Parameter, what it shows, and the optimizer's shard whose gradient that is."""

    def take(self, param: nn.Parameter) -> Tensor:
        """The gradient that has just been put on `param`, which has none afterwards."""
        grad = param.grad
        assert grad is not None
        param.grad = None
        self._taken[id(param)] = param
        return grad.take_arrived() if isinstance(grad, ReducedGradient) else grad

    def show(self) -> None:
        """A backward is over and its gradients are reduced, or wait for others."""
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
        """Parameters on which something is shown, even if it has been replaced or dropped since."""
        return [param for param, _, _ in self._showing]

    def stepped(self) -> None:
        """The gradients that are shown were those of a step that is over."""
        if self.shown is ShownGradient.REDUCED:
            for param, _, _ in self._showing:
                param.grad = None  # also one that was put there by hand: it has been used
            self._showing.clear()

    def forget(self) -> None:
        """No parameter has a gradient, nor shows one."""
        self._showing.clear()
        self._taken.clear()
        for bucket in self._buckets:
            for param in bucket.params:
                param.grad = None

    def clear(self) -> None:
        """Remove what is shown; what others have put there stays."""
        showing, self._showing = self._showing, []
        for param, shown, _ in showing:
            if param.grad is shown:
                param.grad = None

    def make_way_for_compiler(self) -> None:
        """Remove handles before a forward that torch.compile may trace: it describes the gradients of the parameters
        that it meets, and a handle refuses to be described. A backward shows them again.
        """
        if self.shown is ShownGradient.HANDLE and "torch._dynamo" in sys.modules:
            self.clear()

    def adopt(self) -> None:
        """Make gradients that were replaced or dropped since those of the step that follows."""
        for param, shown, shard in self._showing:
            if shard is None or param.grad is shown:
                continue
            if param.grad is None:
                shard.grad = None
            elif shard.grad is not None:
                shard.grad.copy_(param.grad.reshape(shard.grad.shape))
