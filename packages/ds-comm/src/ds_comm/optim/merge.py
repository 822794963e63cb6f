"""States of all ranks as one that loads on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_comm.compress.feedback import merge_feedback_states
from ds_comm.optim.base import FEEDBACK_KEY
from ds_comm.optim.local_sgd import LOCAL_KEY, mean_of, merge_local_states
from ds_comm.optim.sharded import SHARDED_KEY, merge_sharded_states


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the `state_dict()`s of all ranks into one that loads on any number of ranks. Needs no process group.

    Of the optimizers with compressed communication, everything besides residuals is the same on all ranks and is taken
    from the first state. `LocalSGD` has other inner states on each rank: they are averaged. Parts of
    `ShardedOneBitAdam` and `ShardedOneBitLamb` are put together.
    """
    merged = dict(states[0])
    if LOCAL_KEY in merged:
        merged[LOCAL_KEY] = merge_local_states([state[LOCAL_KEY] for state in states])
        merged["state"] = {key: mean_of([state["state"][key] for state in states]) for key in merged["state"]}
        return merged
    if SHARDED_KEY in merged:
        if merged[SHARDED_KEY] is not None:
            merged[SHARDED_KEY] = merge_sharded_states([state[SHARDED_KEY] for state in states])
        return merged
    feedback = [state[FEEDBACK_KEY] for state in states]
    if feedback[0] is not None:
        merged[FEEDBACK_KEY] = merge_feedback_states(feedback)
    return merged
