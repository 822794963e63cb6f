"""Hooks on torch's `state_dict` and `load_state_dict` of a sharded model: they raise if values would be lost, and wait
until updated parameters have been published.

[Note: state_dict of a sharded model]
At stage 3 `model.state_dict()` raises outside of `gathered`. Inside, the gathered parameters have their values, and the
others are tensors without memory that raise when they are read or written to a file. This permits calls that use only
the gathered ones: PEFT calls `state_dict` of the whole model to save the adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ds_zero.runtime.bucket import Bucket, BucketState
from ds_zero.state import ZeroState
from ds_zero.tensors.placeholder import Placeholder

_READABLE = (BucketState.WHOLE, BucketState.GATHERED)
_SHARDED = (
    "parameters that are sharded at stage 3 have no values here, and a file of them would contain NaN. Call "
    "ds_zero.full_state_dict(model) on all ranks, which returns whole values on rank 0; or save inside `with "
    "ds_zero.gathered(params):`, which all ranks must enter; or use ds_zero.dcp_state_dict(model, optimizer) for "
    "torch.distributed.checkpoint"
)

_Find = Callable[[nn.Module], "tuple[ZeroState, list[Bucket]] | None"]


def guard_state_dicts(model: nn.Module, state: ZeroState) -> list[RemovableHandle]:
    """Registers hooks on the model and on all modules that contain sharded parameters, since each of them may be saved
    and loaded separately. The hooks do not keep `state` alive.
    """
    handles: list[RemovableHandle] = []
    for module, buckets in _with_buckets(model, state, recurse=True):
        handles += _guard(module, _finder(module, buckets, state))
    return handles


def wait_in_modules(model: nn.Module, state: ZeroState) -> list[RemovableHandle]:
    """For `overlap_publish`: registers hooks by which every module with parameters of its own waits for published
    values before its forward, also if it is called outside of the model's forward.
    """
    handles = []
    for module, buckets in _with_buckets(model, state, recurse=False):
        find = _finder(module, buckets, state)

        def before(module: nn.Module, *_: object, find: _Find = find) -> None:
            sharding = find(module)
            if sharding is not None:
                sharding[0].stepper.wait()

        handles.append(module.register_forward_pre_hook(before))
    return handles


def _with_buckets(
    model: nn.Module, state: ZeroState, *, recurse: bool
) -> list[tuple[nn.Module, list[Bucket]]]:
    bucket_of = {id(p): b for b in state.buckets for p in b.params}
    with_buckets = []
    for module in model.modules():
        held = {
            id(bucket_of[id(p)]): bucket_of[id(p)] for p in module.parameters(recurse) if id(p) in bucket_of
        }
        if held:
            with_buckets.append((module, list(held.values())))
    return with_buckets


def _finder(module: nn.Module, buckets: list[Bucket], state: ZeroState) -> _Find:
    """Returns a function that returns the state and the buckets of `module`; None for a copy of the module, and after
    the state was deleted.
    """
    me, original = weakref.ref(state), weakref.ref(module)
    held = [weakref.ref(b) for b in buckets]

    def find(module: nn.Module) -> tuple[ZeroState, list[Bucket]] | None:
        live = me()
        if live is None or original() is not module:
            return None
        return live, [b for b in (pointer() for pointer in held) if b is not None]

    return find


def _guard(module: nn.Module, find: _Find) -> list[RemovableHandle]:
    def before_load(module: nn.Module, _: object, prefix: str, metadata: dict[str, Any], *__: object) -> None:
        sharding = find(module)
        if sharding is None:
            return
        state, buckets = sharding
        if metadata.get("assign_to_params_buffers"):
            raise ValueError(
                f"load_state_dict(assign=True) would replace parameters of {_called(module, prefix)}, which ds_zero "
                "has sharded: call it without assign"
            )
        if any(_is_apart(b) and not state.is_written(b) for b in buckets):
            raise ValueError(
                f"load_state_dict on a sharded model ({_called(module, prefix)}) would not change its fp32 masters "
                "and shards, so the next step would undo it: load before ds_zero.shard, or by ds_zero.load_records, "
                "or inside `with ds_zero.gathered(model, write=True):`, or by torch.distributed.checkpoint into "
                "ds_zero.dcp_state_dict(model, optimizer)"
            )
        state.stepper.wait()  # otherwise published values could overwrite the loaded ones

    def before_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        sharding = find(module)
        if sharding is None:
            return
        state, buckets = sharding
        state.stepper.wait()
        # With keep_vars the caller wants the parameters themselves. With a prefix, the outer module was checked.
        if keep_vars or (prefix and state.model() is not module):
            return
        if (
            state.refuses_state_dict
            and not state.open_gathers
            and any(b.state not in _READABLE for b in buckets)
        ):
            raise ValueError(f"state_dict() of {_called(module, prefix)}: {_SHARDED}")

    def after_save(module: nn.Module, saved: dict[str, Any], prefix: str, metadata: object) -> None:
        hooked = find(module)
        if hooked is None:
            return
        hidden = {id(p) for b in hooked[1] if b.state not in _READABLE for p in b.params}
        for name, param in module.named_parameters(prefix.rstrip("."), recurse=False, remove_duplicate=False):
            if id(param) in hidden and name in saved and saved[name] is not param:
                saved[name] = Placeholder.like(param, f"{name!r}: {_SHARDED}")

    return [
        module.register_load_state_dict_pre_hook(before_load),
        module.register_state_dict_pre_hook(before_save),
        module.register_state_dict_post_hook(after_save),
    ]


def _called(module: nn.Module, prefix: str) -> str:
    return f"{prefix.rstrip('.')}: {type(module).__name__}" if prefix else type(module).__name__


def _is_apart(bucket: Bucket) -> bool:
    """Whether the parameters are not the tensors that a step updates."""
    return not bucket.whole or bucket.storage.masters_apart
