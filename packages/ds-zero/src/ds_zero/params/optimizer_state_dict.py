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
"""Key of a state_dict that identifies the rank's shards."""

_REMEDY = (
    "optimizer.state_dict() contains only the shards of one rank. Save and load on any number of ranks with "
    "ds_checkpoint.save and ds_checkpoint.load (or directly with ds_zero.records and ds_zero.load_records), or "
    "save one file per rank and load each on its own rank"
)


def guard_optimizer(optimizer: Optimizer, state: ZeroState) -> list[RemovableHandle]:
    """Registers hooks that mark the result of `state_dict()`, and check the argument of `load_state_dict`. They do not
    keep `state` alive.
    """
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

    def before_save(optimizer: Optimizer) -> None:
        live = me()
        if live is not None:
            live.stepper.settle()

    def before_load(optimizer: Optimizer, given: dict[str, Any]) -> dict[str, Any] | None:
        live = me()
        if live is not None:
            live.stepper.settle()
            _refuse_identities(optimizer)
        return _accepted(optimizer, live, given) if live is not None else None

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        if me() is not None:
            _refuse_identities(optimizer)

    return [
        optimizer.register_step_pre_hook(before_step),
        optimizer.register_state_dict_pre_hook(before_save),
        optimizer.register_state_dict_post_hook(after_save),
        optimizer.register_load_state_dict_pre_hook(before_load),
    ]


_BY_IDENTITY = "torch.distributed.checkpoint.state_dict"
_NUM_FRAMES = 16
"""Number of callers that are examined."""


def _refuse_identities(optimizer: Optimizer) -> None:
    """Raises if torch's `get_state_dict`, `set_state_dict` or a similar function is the caller. They search the
    optimizer's entries among the model's parameters, by identity, but the entries of a sharded optimizer are shards.
    """
    frame = sys._getframe(1)
    for _ in range(_NUM_FRAMES):
        if frame.f_globals.get("__name__") == _BY_IDENTITY:
            _undo_preparation(optimizer, frame.f_locals.get("lrs"))
            raise ValueError(
                f"{_BY_IDENTITY} cannot identify the parameters of an optimizer that ds_zero has sharded: use "
                "dcp.save(ds_zero.dcp_state_dict(model, optimizer), checkpoint_id=...), and dcp.load with the same "
                "argument, which use the same names; or ds_checkpoint.save and load"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back


def _undo_preparation(optimizer: Optimizer, rates: object) -> None:
    """Restores learning rates and gradients. If an optimizer has no states, torch's function creates them by a step
    with gradients of zero and a learning rate of 0; the previous rates are in a local variable of that function.
    """
    if not isinstance(rates, list):
        return
    for group, rate in zip([g for g in optimizer.param_groups if "lr" in g], rates, strict=False):
        group["lr"] = rate
    for group in optimizer.param_groups:
        for entry in group["params"]:
            entry.grad = None


def _accepted(optimizer: Optimizer, state: ZeroState, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the state_dict `given`; if it is that of an unsharded optimizer, this rank's part of it. Collective.

    Raises:
        ValueError: on every rank, if it does not fit on at least one of them.
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
            f"the state_dict contains the shards of rank {mark['rank']} of {mark['ranks']}, but this is rank "
            f"{state.ranks.rank} of {state.ranks.size}, which owns other shards"
        )
    with state.comm.guard("optimizer.load_state_dict()"):
        refused = gathered_flags(bool(problem), state.ranks, state.buckets[0].device)
    if any(refused):
        who = ", ".join(str(rank) for rank, bad in enumerate(refused) if bad)
        problem = problem or f"the state_dict does not fit on rank {who}"
        raise ValueError(f"optimizer.load_state_dict: {problem}. {_REMEDY}")
    return result


def _entries(optimizer: Optimizer, state: ZeroState) -> Iterator[tuple[Bucket, int]]:
    """Yields bucket and index of every entry, in the order of the groups, which is that of indices in a state_dict."""
    place_of = {id(shard): (b, i) for b in state.buckets for i, shard in enumerate(b.shards)}
    for group in optimizer.param_groups:
        for shard in group["params"]:
            yield place_of[id(shard)]


def _shards(optimizer: Optimizer, state: ZeroState) -> str:
    """Returns a checksum of names and element ranges of the entries. It is equal on all ranks at stage 0."""
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
    """Returns this rank's part of the state_dict of an optimizer over whole parameters."""
    states: dict[Any, Any] = dict(given["state"])
    for key, (bucket, index) in enumerate(_entries(optimizer, state)):
        if key not in states:
            continue
        _check_whole(states[key], bucket, index)
        if bucket.layout.undivided and not bucket.storage.pieces[index].numel:
            del states[key]  # in the whole layout another rank owns this tensor
        else:
            states[key] = cut_states(bucket, index, states[key])
    return {**given, "state": states}


def _check_whole(held: Mapping[str, object], bucket: Bucket, index: int) -> None:
    slot = bucket.layout.slots[index]
    for name, value in held.items():
        element_wise = isinstance(value, Tensor) and value.ndim > 0 and name not in NUMBERS
        if element_wise and not bucket.layout.undivided and value.numel() not in (slot.numel, 1):  # type: ignore[attr-defined]
            raise ValueError(
                f"state {name!r} of parameter {slot.fqn!r} has {value.numel()} elements, but the parameter has "  # type: ignore[attr-defined]
                f"{slot.numel}: this is not the state_dict of an optimizer over whole parameters"
            )
