"""Activation checkpointing: keep a layer's inputs, recompute the rest in backward, and choose where the inputs
are stored.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ds_layers import kept_outputs
from ds_layers.input_storage import CopiedInput, OriginalInput, PackedInput, Slabs, StoredInput, enabled_hooks
from ds_layers.kept_outputs import KeepOutputs
from ds_layers.rng import RngTracker

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CheckpointingConfig:
    """Where the inputs of a recomputed layer are stored until backward. By default they stay where they are."""

    group: dist.ProcessGroup | None = None
    """Model-parallel ranks, all of which hold the same inputs. Required by `partition`."""

    partition: bool = False
    """Each rank of `group` stores 1/N of every input; backward gathers the parts."""

    on_host: bool = False
    """Keep inputs in pinned host memory. No effect without an accelerator."""

    contiguous: bool = False
    """Keep inputs of one size in one allocation of `num_checkpoints` slots, so that they do not fragment memory."""

    num_checkpoints: int | None = None
    """Number of calls in one forward, usually the number of layers. Required by `contiguous`."""

    keep_outputs: KeepOutputs = ()
    """Operators whose outputs are kept on the device instead of being computed again, such as ("matmuls",
    "attention"); see `ds_layers.kept_outputs`."""

    preserve_rng_state: bool = True
    """Recompute with the random numbers of the forward pass. Required for layers with dropout."""

    synchronize: bool = False
    """Wait for the accelerator before and after every forward and recomputation, so that the times in `Statistics`
    include the work on the device."""

    def __post_init__(self) -> None:
        if self.partition and self.group is None:
            raise ValueError(
                "partition=True divides inputs among model-parallel ranks: pass their process group as group="
            )
        if self.contiguous and self.num_checkpoints is None:
            raise ValueError(
                "contiguous=True needs num_checkpoints=, the number of calls in one forward "
                "(usually the number of layers)"
            )
        kept_outputs.check(self.keep_outputs)
        if self.num_checkpoints is not None and self.num_checkpoints < 1:
            raise ValueError(f"num_checkpoints={self.num_checkpoints}: it must be at least 1")


@dataclass
class Statistics:
    """Counts and times of a `Checkpointing` object since it was constructed or `reset`."""

    checkpoints: int = 0
    """Calls with gradients enabled."""
    recomputations: int = 0
    resting_bytes: int = 0
    """Bytes of inputs that were copied to other memory on this rank, over all calls. An input that is kept in place
    counts as 0.
    """
    forward_s: float = 0.0
    """Seconds in forward and in recomputations."""
    recompute_s: float = 0.0


class Checkpointing:
    """Activation checkpointing: keeps only the inputs of a layer, and recomputes the rest in backward.

    `out = checkpointing(layer, x, mask)` returns what `layer(x, mask)` returns, and gives the same gradients, including
    those of the layer's parameters. It works whether or not inputs require gradients. Objects are independent.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016); partitioned and host storage:
    Rajbhandari et al., ZeRO (SC 2020), section 6.1.
    """

    def __init__(self, config: CheckpointingConfig | None = None, rng: RngTracker | None = None) -> None:
        """
        Args:
            rng: random number streams that layers use besides torch's default generators; they are restored for the
                recomputation.
        """
        self.config = config or CheckpointingConfig()
        self.rng = rng
        self.statistics = Statistics()
        self._slabs = Slabs(self.config.num_checkpoints or 1) if self.config.contiguous else None

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Returns `function(*args, **kwargs)`, which is recomputed in backward. Arguments may contain tensors in nested
        lists, tuples and dicts.
        """
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        # Imports torch._dynamo, which takes seconds, so it is done only when it is needed.
        from torch.utils.checkpoint import checkpoint

        call = _Call(self, function, args, kwargs)
        # Inputs are passed inside `call`: torch's function would keep tensor arguments alive. It determines the
        # device from its arguments, hence the empty tensor.
        result: T = checkpoint(
            call.run,
            torch.empty(0, device=call.device),
            use_reentrant=False,
            preserve_rng_state=self.config.preserve_rng_state,
        )
        return result

    def reset(self) -> None:
        """Sets the statistics to zero. Slabs are freed once the backwards that use them have ended."""
        self.statistics = Statistics()
        if self._slabs is not None:
            self._slabs = Slabs(self.config.num_checkpoints or 1)

    def store(self, tensor: Tensor) -> StoredInput:
        """Stores one input as configured; for internal use."""
        config = self.config
        partition = config.partition and config.group is not None and tensor.numel() >= config.group.size()
        on_host = config.on_host and tensor.device.type != "cpu"
        movable = tensor.is_floating_point() and not (tensor.is_leaf and tensor.requires_grad)
        if not movable or not (partition or on_host or self._slabs is not None):
            hooks = enabled_hooks() if movable else None
            # A leaf stays alive in any case.
            return OriginalInput(tensor) if hooks is None else PackedInput(tensor, hooks)
        copied = CopiedInput(
            tensor, group=config.group if partition else None, on_host=on_host, slabs=self._slabs
        )
        self.statistics.resting_bytes += copied.num_bytes
        return copied

    @contextlib.contextmanager
    def observe(self, what: str, device: torch.device) -> Iterator[None]:
        """Marks a range for profilers, and measures its time."""
        self._synchronize(device)
        start = time.perf_counter()
        try:
            with torch.profiler.record_function(f"ds.layers.checkpoint/{what}"):
                yield
        finally:
            self._synchronize(device)
            spent = time.perf_counter() - start
            if what == "forward":
                self.statistics.checkpoints += 1
                self.statistics.forward_s += spent
            else:
                self.statistics.recomputations += 1
                self.statistics.recompute_s += spent

    def _synchronize(self, device: torch.device) -> None:
        if self.config.synchronize and device.type != "cpu":
            torch.accelerator.synchronize(device)


def _input(stored: StoredInput, requires_grad: bool) -> Tensor:
    """Returns an input of the recomputation. It is not a leaf, since the function may write into it."""
    if not requires_grad:
        return stored.restore()
    anchor = torch.empty(0, requires_grad=True)
    value: Tensor = _Computed.apply(anchor, stored)  # type: ignore[no-untyped-call]
    return value


class _Computed(torch.autograd.Function):
    """Makes a tensor require gradients without being a leaf. Its own gradient is not used."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, stored: StoredInput) -> Tensor:
        return stored.restore()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Call:
    """One call: its function, its inputs for the forward pass, and the stored inputs for the recomputation."""

    def __init__(
        self, owner: Checkpointing, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> None:
        self._owner, self._function = owner, function
        leaves, self._spec = pytree.tree_flatten((tuple(args), kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.device = tensors[0].device if tensors else torch.get_default_device()
        # Stored before the function runs, because it may write into its inputs.
        self._stored: list[tuple[StoredInput, bool] | None] = [
            (owner.store(leaf), leaf.requires_grad) if isinstance(leaf, Tensor) else None for leaf in leaves
        ]
        self._first: list[Any] | None = leaves
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._streams = owner.rng.states() if owner.rng is not None else None
        keep = owner.config.keep_outputs
        self._kept = kept_outputs.contexts(keep) if callable(keep) or keep else None

    def run(self, _: Tensor) -> Any:
        if self._first is not None:
            leaves, self._first = self._first, None
            with self._owner.observe("forward", self.device):
                return self._apply(leaves, 0)
        restored = [
            leaf if stored is None else _input(*stored)
            for leaf, stored in zip(self._others, self._stored, strict=True)
        ]
        with self._streams_of_forward(), self._owner.observe("recompute", self.device):
            return self._apply(restored, 1)

    def _apply(self, leaves: list[Any], time: int) -> Any:
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        # Inside of what stores and restores inputs, which only one of both times does.
        with contextlib.nullcontext() if self._kept is None else self._kept[time]:
            return self._function(*args, **kwargs)

    @contextlib.contextmanager
    def _streams_of_forward(self) -> Iterator[None]:
        tracker = self._owner.rng
        if tracker is None or self._streams is None:
            yield
            return
        now = tracker.states()
        tracker.set_states(self._streams)
        try:
            yield
        finally:
            tracker.set_states(now)
