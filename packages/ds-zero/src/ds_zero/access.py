"""Whole values of sharded parameters, for reading and writing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ds_zero import _registry
from ds_zero.bucket import Bucket
from ds_zero.build import tell_everybody
from ds_zero.state import ZeroState


@contextlib.contextmanager
def gathered(params: nn.Parameter | Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """Whole parameters inside the context, at every stage. Collective: all ranks enter with the same
    parameters.

    With `write`, rank 0's values at the end of the context become everybody's, masters included; without it,
    a write raises.

    Raises:
        ValueError: parameters that are not sharded; a parameter that was written without `write=True`.
    """
    wanted = [params] if isinstance(params, nn.Parameter) else list(params)
    if not wanted:
        yield
        return
    state = _registry.state_of(wanted[0])
    found: dict[int, Bucket] = {}
    for param in wanted:
        bucket, _ = state.bucket_of(param)
        found[id(bucket)] = bucket
    buckets = list(found.values())
    state.stepper.wait()
    state.gatherer.acquire(buckets)
    versions = [p._version for p in wanted]
    try:
        yield
        changed = [p for p, version in zip(wanted, versions, strict=True) if p._version != version]
        if write:
            _adopt(state, buckets)
        elif changed:
            names = [_name(state, p) for p in changed]
            raise ValueError(
                f"{names} were written inside gathered(..., write=False): the change would be lost; pass "
                "write=True"
            )
    finally:
        state.gatherer.release(buckets)


def _name(state: ZeroState, param: nn.Parameter) -> str:
    bucket, index = state.bucket_of(param)
    return bucket.layout.slots[index].fqn


def _adopt(state: ZeroState, buckets: list[Bucket]) -> None:
    """Rank 0's whole values into everybody's shards."""
    with torch.no_grad():
        for bucket in buckets:
            tell_everybody(bucket.full, bucket.ranks)
            begin, end = bucket.owned_range
            if bucket.low.data_ptr() != bucket.full[begin:end].data_ptr():
                bucket.low.copy_(bucket.full[begin:end])
            if bucket.master is not None and bucket.master is not bucket.low:
                # Keep what the cast cannot express where the low-precision value did not change.
                same = bucket.master.to(bucket.low.dtype) == bucket.low
                bucket.master.copy_(torch.where(same, bucket.master, bucket.low.float()))


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Names -> whole values on the CPU, on rank 0 (elsewhere empty). Collective.

    Parameters come from the fp32 masters, frozen ones in their own dtype; tied parameters appear under each
    of their names, as one tensor; persistent buffers are included. Rank 0 holds one bucket beyond what it
    returns.
    """
    state = _registry.state_of(model)
    state.stepper.wait()
    found: dict[str, Tensor] = {}
    for bucket in state.buckets:
        whole = _whole(state, bucket)
        if state.ranks.first:
            for slot in bucket.layout.slots:
                value = whole[slot.offset : slot.end].view(slot.shape).cpu().clone()
                for name in state.names[slot.fqn]:
                    found[name] = value
    if not state.ranks.first:
        return {}
    found |= {n: b.detach().cpu().clone() for n, b in model.named_buffers()}
    return {name: found[name] for name in model.state_dict(keep_vars=True)}


def _whole(state: ZeroState, bucket: Bucket) -> Tensor:
    """All of a bucket in the best precision there is."""
    own = bucket.master if bucket.master is not None else bucket.low
    if bucket.layout.num_owners == 1 or bucket.ranks.group is None:
        return own.detach()
    return state.comm.gather_slices(own.detach(), bucket.ranks, bucket.device, bucket.layout.slice_sizes)
