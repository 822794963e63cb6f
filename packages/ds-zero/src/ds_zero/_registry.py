"""Maps modules, parameters and optimizers to the state that `shard` made for them. The maps are weak, keyed by
identity, and never iterated.

A module keeps its state alive; parameters and optimizers refer to it weakly. A state refers to parameters but never
to its module, so no entry outlives the model.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ds_zero.comm.thread_claim import ThreadClaim
    from ds_zero.interfaces import InitialValues
    from ds_zero.state import ZeroState

_of_module: WeakIdKeyDictionary = WeakIdKeyDictionary()
_of_part: WeakIdKeyDictionary = WeakIdKeyDictionary()
_record_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
_leaves: WeakIdKeyDictionary = WeakIdKeyDictionary()
_claim_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
_places = itertools.count()


def put(model: nn.Module, params: list[nn.Parameter], state: ZeroState) -> None:
    _of_module[model] = state
    for param in params:
        put_part(param, state)


def put_part(part: nn.Parameter | Optimizer, state: ZeroState) -> None:
    _of_part[part] = weakref.ref(state)


def drop(model: nn.Module, parts: list[nn.Parameter | Optimizer]) -> None:
    _of_module.pop(model, None)
    for part in parts:
        _of_part.pop(part, None)


def find(owner: nn.Module | nn.Parameter | Optimizer) -> ZeroState | None:
    if isinstance(owner, nn.Module):
        state: ZeroState | None = _of_module.get(owner)
        return state
    pointer = _of_part.get(owner)
    return pointer() if pointer is not None else None


def state_of(owner: nn.Module | nn.Parameter | Optimizer) -> ZeroState:
    """Returns the state of a sharded object. Raises ValueError if it is not sharded."""
    state = find(owner)
    if state is None:
        raise ValueError(
            f"this {type(owner).__name__} is not sharded: call ds_zero.shard(model, optimizer, stage=...) "
            "first, "
            "and pass the same objects"
        )
    return state


def put_record(tensor: Tensor, record: InitialValues) -> None:
    _record_of[tensor] = record


def find_record(tensor: Tensor) -> InitialValues | None:
    record: InitialValues | None = _record_of.get(tensor)
    return record


def drop_record(tensor: Tensor) -> None:
    _record_of.pop(tensor, None)


def next_place() -> int:
    """Returns the next number in the order in which this process constructs sharded parameters."""
    return next(_places)


def put_claim(group: ProcessGroup, claim: ThreadClaim) -> None:
    _claim_of[group] = weakref.ref(claim)


def claim_of(group: ProcessGroup) -> ThreadClaim | None:
    pointer = _claim_of.get(group)
    return pointer() if pointer is not None else None


def mark_leaf(module: nn.Module) -> None:
    _leaves[module] = True


def is_leaf(module: nn.Module) -> bool:
    return module in _leaves
