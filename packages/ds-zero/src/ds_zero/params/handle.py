"""One parameter of a sharded model on one rank, and collectives over the ranks that share it."""

from __future__ import annotations

import enum
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.comm.ranks import Ranks
from ds_zero.interfaces import SplitsMasters
from ds_zero.layout.buckets import Piece, Slot, piece_of
from ds_zero.params.gathered_context import exchange_flags
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.materialize import NUMBERS, broadcast_values
from ds_zero.runtime.optimizer_states import MASTER_BITS, splits_masters, states_opened
from ds_zero.state import ZeroState

Where = nn.Parameter | str
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.int16,
)
_MAX_DIMS = 8


class StateKind(enum.IntEnum):
    """Kind of an optimizer state of one parameter."""

    NOTHING = 0
    """There is no such state."""
    NUMBER = 1
    """One number, the same on all ranks that have it."""
    ELEMENTS = 2
    """One value for each element of the parameter."""
    OTHER = 3
    """A tensor of another shape, on the one rank that owns the whole parameter."""


@dataclass(frozen=True)
class Place:
    """One parameter, and its bucket on this rank."""

    state: ZeroState
    bucket: Bucket
    index: int

    @property
    def slot(self) -> Slot:
        return self.bucket.layout.slots[self.index]

    @property
    def fqn(self) -> str:
        return self.slot.fqn

    @property
    def ranks(self) -> Ranks:
        return self.bucket.ranks

    @property
    def shard(self) -> Tensor | None:
        """The optimizer's entry; None for a frozen parameter."""
        return self.bucket.shards[self.index] if self.bucket.shards else None

    @property
    def own(self) -> Piece:
        """The part that this rank owns; the offset is relative to the beginning of its owned range."""
        return piece_of(self.slot, *self.bucket.owned_range)

    @property
    def divided(self) -> bool:
        """Whether ranks own different parts of the parameter."""
        return self.bucket.layout.num_owners > 1 and self.ranks.group is not None

    def part(self, owned: Tensor) -> Tensor:
        """Returns this parameter's elements of a 1-D tensor over the owned range."""
        own = self.own
        return owned[own.offset : own.offset + own.numel]

    def held(self) -> dict[str, object]:
        """Returns the optimizer's states of this rank's shard; empty if there are none."""
        optimizer = self.state.optimizer() if self.state.optimizer is not None else None
        shard = self.shard
        if optimizer is None or shard is None or shard not in optimizer.state:
            return {}
        states: dict[str, object] = optimizer.state[shard]
        return states

    def states_opened(self) -> AbstractContextManager[None]:
        """Context manager within which changes of `held()` are kept."""
        optimizer = self.state.optimizer() if self.state.optimizer is not None else None
        return states_opened(optimizer, [self.shard] if self.shard is not None else [], write=True)

    def _splits_masters(self) -> SplitsMasters | None:
        """The optimizer, if it keeps the master of this parameter in two halves."""
        optimizer = self.state.optimizer() if self.state.optimizer is not None else None
        bucket = self.bucket
        is_split = bucket.trainable and bucket.storage.exact_dtype == torch.bfloat16
        return splits_masters(optimizer) if is_split else None

    def joined(self, part: Tensor) -> Tensor:
        """Returns this rank's authoritative values in fp32, given what the bucket has of them."""
        splits, low = self._splits_masters(), self.held().get(MASTER_BITS)
        if splits is None or not isinstance(low, Tensor):  # before the first step, the bucket has all bits
            return part.float()
        return splits.join_master(part, low.reshape(-1))

    def narrowed(self, values: Tensor) -> Tensor:
        """Returns new 1-D fp32 values as the bucket stores them: rounded as by the optimizer, if masters are split."""
        splits = self._splits_masters()
        return values if splits is None else splits.split_master(values)[0]

    def write_master_bits(self, own: Tensor) -> None:
        """Writes the halves of new values of this rank that are not in the bucket, if masters are split."""
        splits = self._splits_masters()
        if splits is None or not own.numel():
            return
        with self.states_opened():
            low = self.held().get(MASTER_BITS)
            if isinstance(low, Tensor):
                low.view(-1).copy_(splits.split_master(own)[1])

    def checked(self, value: Tensor) -> Tensor:
        """Returns `value`, which must have the parameter's shape.

        Raises:
            ValueError: it has another shape.
        """
        if tuple(value.shape) != self.slot.shape:
            raise ValueError(
                f"{self.fqn!r} has shape {self.slot.shape} but the value has shape {tuple(value.shape)}"
            )
        return value


def find(model: nn.Module | None, where: Where) -> Place:
    """Finds a parameter, given itself or any of its names.

    Raises:
        ValueError: the model is not sharded, or has no such parameter.
    """
    if isinstance(where, str) and model is None:
        raise ValueError(
            f"a name ({where!r}) needs the model that contains it: pass the model, or the parameter itself"
        )
    state = _registry.state_of(model if model is not None else where)  # type: ignore[arg-type]
    if not isinstance(where, str):
        return Place(state, *state.bucket_of(where))
    first = next((f for f, names in state.names.items() if where in names), None)
    for bucket in state.buckets:
        for index, slot in enumerate(bucket.layout.slots):
            if slot.fqn == first:
                return Place(state, bucket, index)
    raise ValueError(f"the model has no parameter {where!r}; the first ones are {list(state.names)[:5]}")


def assemble(place: Place, own: Tensor, *, slices: bool = False) -> Tensor:
    """Returns the whole value, in the parameter's shape, from the parts of all ranks. Collective.

    Args:
        own: this rank's part, 1-D, on the model's device.
        slices: whether parts are those of the slices that ranks reduce, instead of the owned ranges. They differ in
            stage 0, where every rank owns everything.
    """
    slot, ranks, layout = place.slot, place.ranks, place.bucket.layout
    if not place.divided and not (slices and ranks.group is not None):
        return own.clone().view(slot.shape)
    whole = torch.empty(slot.numel, dtype=own.dtype, device=own.device)
    for rank in range(ranks.size):
        piece = piece_of(slot, *(layout.slice_range(rank) if slices else layout.owned_range(rank)))
        if piece.numel:
            part = whole[piece.start : piece.start + piece.numel]
            if rank == ranks.rank:
                part.copy_(own)
            dist.broadcast(part, group=ranks.group, group_src=rank)
    return whole.view(slot.shape)


def any_rank(ranks: Ranks, flags: list[bool], device: torch.device) -> list[bool]:
    """Returns, for each flag, whether it is set on at least one rank. Collective."""
    if not flags or ranks.total == 1:
        return flags
    on_any_rank: list[bool] = exchange_flags(flags, ranks, device).any(0).any(0).tolist()
    return on_any_rank


def from_first(place: Place, value: Tensor | float | None) -> Tensor:
    """Broadcasts rank 0's value, in fp32; for a frozen parameter in its own dtype. Collective."""
    bucket = place.bucket
    dtype = torch.float32 if bucket.trainable else bucket.dtype
    if isinstance(value, Tensor):
        whole = place.checked(value).detach().to(bucket.device, dtype, copy=True).contiguous()
    elif place.ranks.first:
        raise ValueError(f"{place.fqn!r}: rank 0 needs a tensor of shape {place.slot.shape}, not {value!r}")
    else:
        whole = torch.empty(place.slot.shape, dtype=dtype, device=bucket.device)
    broadcast_values(whole, place.ranks)
    return whole


# --- optimizer states


def kind_of_state(place: Place, name: str, *, required: bool = True) -> tuple[StateKind, torch.dtype]:
    """Returns kind and dtype of a state over all ranks; a rank that owns no elements may have no state. Collective.

    Raises:
        ValueError: no rank has the state, and it is required.
    """
    held, shard = place.held().get(name), place.shard
    kind, dtype = StateKind.NOTHING, torch.float32
    if isinstance(held, Tensor) and shard is not None:
        dtype = held.dtype
        if held.shape == shard.shape and (held.ndim or name not in NUMBERS):
            kind = StateKind.ELEMENTS if held.numel() else StateKind.NOTHING
        else:
            kind = StateKind.OTHER if held.ndim else StateKind.NUMBER
    elif isinstance(held, (int, float)):
        kind = StateKind.NUMBER
    code = len(_DTYPES) * kind + (_DTYPES.index(dtype) if kind else 0)
    packed = torch.tensor([code]).to(place.bucket.device)
    if place.ranks.group is not None:
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=place.ranks.group)
    number, index = divmod(int(packed.item()), len(_DTYPES))
    if number == StateKind.NOTHING and required:
        raise ValueError(
            f"the optimizer has no state {name!r} for {place.fqn!r} (it has {sorted(place.held())}): states appear in "
            "the first step"
        )
    return StateKind(number), _DTYPES[index]


def whole_state(place: Place, name: str) -> Tensor | None:
    """Returns a whole optimizer state from the parts of all ranks; None if no rank has it. Collective."""
    kind, dtype = kind_of_state(place, name, required=False)
    held, device = place.held().get(name), place.bucket.device
    if kind is StateKind.NOTHING:
        return None
    if kind is StateKind.NUMBER:
        mine = [float(held)] if isinstance(held, (int, float, Tensor)) else [float("-inf")]
        number = torch.tensor(mine, dtype=torch.float64).to(device)
        if place.ranks.group is not None:
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=place.ranks.group)
        return number[0].float()
    own = held.detach() if isinstance(held, Tensor) else torch.empty(0, dtype=dtype)
    if kind is StateKind.ELEMENTS:
        return assemble(place, own.reshape(-1).to(device))
    return _from_owner(place, own.to(device))


def _from_owner(place: Place, own: Tensor) -> Tensor:
    """Broadcasts a state whose shape is not that of the parameter, from the rank that owns the parameter."""
    ranges = [place.bucket.layout.owned_range(rank) for rank in range(place.ranks.size)]
    owner = next(r for r, ends in enumerate(ranges) if piece_of(place.slot, *ends).numel == place.slot.numel)
    if not place.divided:
        return own.clone()
    shape = torch.full((_MAX_DIMS,), -1)
    if owner == place.ranks.rank:
        shape[: own.ndim] = torch.tensor(own.shape)
    shape = shape.to(own.device)
    dist.broadcast(shape, group=place.ranks.group, group_src=owner)
    whole = torch.empty([n for n in shape.tolist() if n >= 0], dtype=own.dtype, device=own.device)
    if owner == place.ranks.rank:
        whole.copy_(own)
    dist.broadcast(whole, group=place.ranks.group, group_src=owner)
    return whole
