"""Tells where torch's own `state_dict` and `load_state_dict` would lose values of a sharded model in
silence.
"""

from __future__ import annotations

import warnings
import weakref

from torch import nn
from torch.utils.hooks import RemovableHandle

from ds_zero.bucket import BucketState
from ds_zero.state import ZeroState


def guard_state_dicts(model: nn.Module, state: ZeroState) -> list[RemovableHandle]:
    """Hook both, without keeping `state` alive; copies of the model are not concerned."""
    me = weakref.ref(state)

    def before_load(module: nn.Module, *_: object) -> None:
        found = me()
        if found is None or found.model() is not module:
            return
        if any(not b.whole or (b.master is not None and b.master is not b.low) for b in found.buckets):
            raise ValueError(
                "load_state_dict on a sharded model does not reach its fp32 masters and shards, so the next step "
                "would undo it: load before ds_zero.shard, or ds_zero.load_records, or write inside "
                "`with ds_zero.gathered(model.parameters(), write=True):`"
            )

    def before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        found = me()
        if keep_vars or found is None or found.model() is not module:
            return
        if any(
            b.state is not BucketState.WHOLE and b.state is not BucketState.GATHERED for b in found.buckets
        ):
            warnings.warn(
                "state_dict() of a model that is sharded at stage 3 holds NaN for sharded parameters: call "
                "ds_zero.full_state_dict(model) on all ranks",
                stacklevel=4,
            )

    handles: list[RemovableHandle] = [
        model.register_load_state_dict_pre_hook(before_load),
        model.register_state_dict_pre_hook(before_save),
    ]
    return handles
