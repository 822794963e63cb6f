"""`state_dict()` and `load_state_dict()` of a sharded optimizer: each rank's state dict contains and records its own
shards.
"""

from __future__ import annotations

import sys
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ds_zero.comm.agreement import gathered_flags
from ds_zero.runtime.bucket import Bucket
from ds_zero.runtime.materialize import NUMBERS, cut_states
from ds_zero.state import ZeroState

MARK = "ds_zero"
"""Key of a state_dict under which a rank says which shards it holds."""

_REMEDY = (
    "optimizer.state_dict() contains only the shards of one rank. Save and load on any number of ranks with "
    "ds_checkpoint.save and ds_checkpoint.load (or directly with ds_zero.records and ds_zero.load_records), or "
    "save one file per rank and load each on its own rank"
)


def guard_optimizer(optimizer: Optimizer, state: ZeroState) -> list[RemovableHandle]:
    """Mark what `state_dict()` gives, and check what `load_state_dict` gets. The hooks do not keep `state` alive."""
    me = weakref.ref(state)

    def after_save(optimizer: Optimizer, saved: dict[str, Any]) -> None:
        live = me()
        if live is not None:
            _refuse_identities(optimizer)
            saved[MARK] = {
                "shards": _shards(optimizer, live),
                "rank": live.ranks.rank,
                "ranks": live.ranks.size,
            }

    def before_load(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
        live = me()
        if live is not None:
            _refuse_identities(optimizer)
        return _accepted(optimizer, live, given) if live is not None else None

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        if me() is not None:
            _refuse_identities(optimizer)

    return [
        optimizer.register_step_pre_hook(before_step),
        optimizer.register_state_dict_post_hook(after_save),
        optimizer.register_load_state_dict_pre_hook(before_load),
    ]


_BY_IDENTITY = "torch.distributed.checkpoint.state_dict"
_NUM_FRAMES = 16
"""Callers that are looked at: the functions of that module are near."""


def _refuse_identities(optimizer: Optimizer) -> None:
    """Raise where torch's `get_state_dict`, `set_state_dict` or their like ask. They look entries of the optimizer up
    among the model's parameters, by identity, and those of a sharded optimizer are shards.
    """
    frame = sys._getframe(1)
    for _ in range(_NUM_FRAMES):
        if frame.f_globals.get("__name__") == _BY_IDENTITY:
            _undo_preparation(optimizer, frame.f_locals.get("lrs"))
            raise ValueError(
                f"{_BY_IDENTITY} cannot tell the parameters of an optimizer that ds_zero has sharded: use "
                "dcp.save(ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=...), and dcp.load with the same, "
                "which read and write the same names; or ds_checkpoint.save and load"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back


def _undo_preparation(optimizer: Optimizer, rates: object) -> None:
    """To have states, torch steps an optimizer that has none with gradients of zero and a learning rate of 0. The rates
    of before are in a local variable of that function.
    """
    if not isinstance(rates, list):
        return
    for group, rate in zip([g for g in optimizer.param_groups if "lr" in g], rates, strict=False):
        group["lr"] = rate
    for group in optimizer.param_groups:
        for entry in group["params"]:
            entry.grad = None


def _accepted(optimizer: Optimizer, state: ZeroState, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with states of whole tensors cut along. Collective.

    Raises:
        ValueError: on every rank, if it fits on no rank or only on some.
    """
    problem, result = "", given
    mark = given.get(MARK)
    if mark is None:
        try:
            result = _cut(optimizer, state, given)
        except ValueError as error:
            problem = str(error)
    elif mark["shards"] != _shards(optimizer, state):
        problem = (
            f"the state_dict holds the shards of rank {mark['rank']} of {mark['ranks']}, and this is rank "
            f"{state.ranks.rank} of {state.ranks.size}, which owns others"
        )
    with state.comm.guard("optimizer.load_state_dict()"):
        refused = gathered_flags(bool(problem), state.ranks, state.buckets[0].device)
    if any(refused):
        who = ", ".join(str(rank) for rank, bad in enumerate(refused) if bad)
        problem = problem or f"the state_dict does not fit on rank {who}"
        raise ValueError(f"optimizer.load_state_dict: {problem}. {_REMEDY}")
    return result


def _entries(optimizer: Optimizer, state: ZeroState) -> Iterator[tuple[Bucket, int]]:
    """Bucket and index of every entry, in the order of the groups: that of indices in a state_dict."""
    place_of = {id(shard): (b, i) for b in state.buckets for i, shard in enumerate(b.shards)}
    for group in optimizer.param_groups:
        for shard in group["params"]:
            yield place_of[id(shard)]


def _shards(optimizer: Optimizer, state: ZeroState) -> str:
    """A checksum of which elements of which parameters the entries hold; the same on all ranks of stage 0."""
    owned = [
        (
            b.layout.slots[i].fqn,
            b.storage.pieces[i].start,
            b.storage.pieces[i].numel,
            b.layout.undivided,
            b.ranks.part,
        )
        for b, i in _entries(optimizer, state)
    ]
    return f"{zlib.crc32(repr(owned).encode()):08x}"


def _cut(optimizer: Optimizer, state: ZeroState, given: dict[str, Any]) -> dict[str, Any]:
    """The state_dict of an optimizer over whole parameters, as this rank needs it."""
    states: dict[Any, Any] = dict(given["state"])
    for key, (bucket, index) in enumerate(_entries(optimizer, state)):
        if key not in states:
            continue
        _check_whole(states[key], bucket, index)
        if bucket.layout.undivided and not bucket.storage.pieces[index].numel:
            del states[key]  # whole tensors rest with one rank
        else:
            states[key] = cut_states(bucket, index, states[key])
    return {**given, "state": states}


def _check_whole(held: Mapping[str, object], bucket: Bucket, index: int) -> None:
    slot = bucket.layout.slots[index]
    for name, value in held.items():
        element_wise = isinstance(value, Tensor) and value.ndim > 0 and name not in NUMBERS
        if element_wise and not bucket.layout.undivided and value.numel() not in (slot.numel, 1):  # type: ignore[attr-defined]
            raise ValueError(
                f"state {name!r} of parameter {slot.fqn!r} has {value.numel()} elements, and the parameter has "  # type: ignore[attr-defined]
                f"{slot.numel}: it is no state_dict of an optimizer over whole parameters"
            )
