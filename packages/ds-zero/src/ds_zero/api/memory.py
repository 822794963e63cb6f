"""The memory that each rank holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.interfaces import PagesState
from ds_zero.runtime.storage import GRAD, MASTER, PARAM
from ds_zero.tensors.sizes import human_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Bytes that one rank holds between steps, by purpose. Memory with several purposes counts once, for the first
    of them in the order of the fields. What a store keeps away is not counted, but the buffers in which it is used are.
    """

    params_bytes: int
    """Parameters in compute dtype: whole buckets, and this rank's shards of other buckets, including secondary
    shards.
    """
    masters_bytes: int
    """fp32 masters that are not the parameters themselves."""
    grads_bytes: int
    """Reduced gradients of the shards, and whole gradients during local accumulation."""
    optimizer_bytes: int
    """Tensors in `optimizer.state` with at least one dimension; of an optimizer that keeps its states away, the memory
    into which it loads them."""
    buffers_bytes: int
    """The module's buffers."""
    gathered_bytes: int
    """Stage-3 parameters that are gathered at the moment."""

    @property
    def total_bytes(self) -> int:
        return (
            self.params_bytes
            + self.masters_bytes
            + self.grads_bytes
            + self.optimizer_bytes
            + self.buffers_bytes
            + self.gathered_bytes
        )

    def __str__(self) -> str:
        """Formats the bytes of each purpose that has memory, and the sum, in one line."""
        purposes = {field.name.removesuffix("_bytes"): getattr(self, field.name) for field in fields(self)}
        held = {name: num_bytes for name, num_bytes in purposes.items() if num_bytes} | {
            "total": self.total_bytes
        }
        return "\n".join(f"{name:<10}{human_bytes(num_bytes):>12}" for name, num_bytes in held.items())


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How `shard` has divided a model: sizes and effective settings."""

    stage: int
    accumulation: str
    """"local" or "sharded"."""
    num_ranks: int
    params_numel: int
    trainable_numel: int
    owned_numel: int
    """Number of elements whose masters and optimizer states this rank holds, including padding."""
    num_buckets: int
    num_gathered_buckets: int
    """Number of buckets that are gathered while their module runs, and freed afterwards (stage 3)."""
    compute_dtypes: tuple[str, ...]


def _bytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    """Returns the bytes of the distinct storages, each counted in full."""
    total = 0
    for tensor in tensors:
        if tensor is None or tensor.untyped_storage().nbytes() == 0:
            continue
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in seen:
            seen.add(pointer)
            total += tensor.untyped_storage().nbytes()
    return total


def memory(model: nn.Module, optimizer: Optimizer) -> MemoryReport:
    """Returns the bytes that this rank holds now, counted from existing storages. Not collective."""
    state = _registry.state_of(model)
    buckets = state.buckets
    seen: set[int] = set()
    gathered = state.gatherer.gathered_bytes()
    for bucket in buckets:
        if not bucket.whole and bucket.full.untyped_storage().nbytes():
            seen.add(bucket.full.untyped_storage().data_ptr())

    def staging(kind: str) -> int:
        return buckets[0].storage.staging.num_bytes(kind) if buckets else 0

    return MemoryReport(
        gathered_bytes=gathered,
        params_bytes=_bytes([b.full if b.whole else b.storage.addressable(PARAM) for b in buckets], seen)
        + _bytes([b.secondary.tensor for b in buckets if b.secondary is not None], seen)
        + staging(PARAM),
        masters_bytes=_bytes([b.storage.addressable(MASTER) for b in buckets], seen) + staging(MASTER),
        grads_bytes=_bytes([b.storage.addressable(GRAD) for b in buckets], seen)
        + staging(GRAD)
        + state.reducer.local_bytes(),
        optimizer_bytes=optimizer.buffer_bytes
        if isinstance(optimizer, PagesState)
        else _bytes(
            [
                v
                for held in optimizer.state.values()
                for v in held.values()
                if isinstance(v, Tensor) and v.ndim
            ],
            seen,
        ),
        buffers_bytes=_bytes(model.buffers(), seen),
    )


def describe(model: nn.Module) -> Summary:
    """Returns the effective settings, and how the model was divided."""
    state = _registry.state_of(model)
    params = [p for b in state.buckets for p in b.params]
    return Summary(
        stage=state.stage,
        accumulation="sharded" if state.reducer.reduction == "sharded" else "local",
        num_ranks=state.ranks.total,
        params_numel=sum(p.numel() for p in params),
        trainable_numel=sum(p.numel() for b in state.buckets if b.trainable for p in b.params),
        owned_numel=sum(b.owned_range[1] - b.owned_range[0] for b in state.buckets if b.trainable),
        num_buckets=len(state.buckets),
        num_gathered_buckets=sum(not b.whole for b in state.buckets),
        compute_dtypes=tuple(sorted({b.layout.dtype for b in state.buckets})),
    )
