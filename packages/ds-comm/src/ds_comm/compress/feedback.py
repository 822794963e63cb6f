"""Error feedback: what compression lost is added to the next tensor that is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.interfaces import Compressor

DTYPES = (torch.float32, torch.bfloat16)


class ResidualError(ValueError):
    """Saved residuals do not fit: the message names what differs, both values, and what to do."""


class ErrorFeedback:
    """The residuals of one rank in a two-phase compressed all-reduce (Tang et al. 2021, algorithm 1).

    `worker` has the size of the buffer: what this rank's own values lost in the first phase. `server` has the size of
    this rank's part: what the average of that part lost in the second phase. The sum of all averages that were sent,
    plus the mean of the worker residuals over ranks, plus the server residuals, is the sum of all averages that should
    have been sent; so nothing is lost, only delayed.
    """

    def __init__(
        self,
        compressor: Compressor,
        blocks: Blocks,
        *,
        rank: int,
        world_size: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes residuals of zeros.

        Args:
            compressor: encodes both phases.
            blocks: the buffer's blocks. Ranks own consecutive parts of nearly equal size.
            rank: of this process in the group.
            world_size: size of the group.
            device: of the buffer; None: the CPU.
            dtype: of the residuals, torch.float32 or torch.bfloat16.
        """
        if dtype not in DTYPES:
            raise ValueError(f"the residuals' dtype must be torch.float32 or torch.bfloat16, but is {dtype}")
        device = torch.device("cpu") if device is None else device
        self.compressor = compressor
        self.rank = rank
        self.world_size = world_size
        self.parts = [(start, part.to(device)) for start, part in blocks.cut(world_size)]
        """First element of each rank's part, and its blocks."""
        self.numel = blocks.numel
        self.worker = torch.zeros(self.numel, dtype=dtype, device=device)
        self.server = torch.zeros(self.parts[rank][1].numel, dtype=dtype, device=device)

    @property
    def server_start(self) -> int:
        """First element of this rank's part."""
        return self.parts[self.rank][0]

    @property
    def num_bytes(self) -> int:
        """Bytes of both residuals."""
        return self.worker.nbytes + self.server.nbytes

    def clear(self) -> None:
        """Forgets what was lost so far."""
        self.worker.zero_()
        self.server.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's residuals, without copying them. `merge_feedback_states` makes one state for any number
        of ranks from those of all ranks.
        """
        return {
            "form": "rank",
            "rank": self.rank,
            "world_size": self.world_size,
            "numel": self.numel,
            "server_start": self.server_start,
            "worker": self.worker,
            "server": self.server,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads this rank's own state, or one from `merge_feedback_states`, which may be of another number of ranks.

        Raises ResidualError if the state belongs to another buffer, rank or number of ranks.
        """
        if state["numel"] != self.numel:
            raise ResidualError(
                f"the saved residuals have {state['numel']} elements, but the parameters need {self.numel}; "
                f"load them into an optimizer of the same parameters"
            )
        check_owner(state, self.rank, self.world_size)
        whole = state["form"] == "whole"
        self.worker.copy_(state["worker"])
        server = state["server"]
        start = self.server_start - (0 if whole else state["server_start"])
        if start < 0 or start + self.server.numel() > server.numel():
            raise ResidualError(
                f"the saved server residual of rank {self.rank} begins at element {state['server_start']}, but its "
                f"part now begins at {self.server_start}: block_numel has changed; use the old one, or merge the "
                f"states of all ranks (merge_states)"
            )
        self.server.copy_(server[start : start + self.server.numel()])


def check_owner(state: Mapping[str, Any], rank: int, world_size: int) -> None:
    """Raises ResidualError if a state is that of another rank, or of another number of ranks."""
    if state["form"] == "whole" or (state["world_size"], state["rank"]) == (world_size, rank):
        return
    raise ResidualError(
        f"the saved residuals are those of rank {state['rank']} of {state['world_size']}, but this is rank {rank} of "
        f"{world_size}; merge the states of all ranks first (merge_states), or save with whole_state_dict()"
    )


def merge_feedback_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all ranks of a group into one that loads on any number of ranks.

    Every rank then starts with the mean of the worker residuals, so that their mean, which is all that the average of
    later steps depends on, is unchanged. Parts of the server residual are put together and cut anew.

    Raises ResidualError if the states are not those of all ranks of one group.
    """
    by_rank = {state["rank"]: state for state in states}
    world_size = states[0]["world_size"] if states else 0
    missing = sorted(set(range(world_size)) - set(by_rank))
    sizes = {(state["world_size"], state["numel"]) for state in states}
    if not states or missing or len(sizes) != 1 or len(by_rank) != len(states):
        raise ResidualError(
            f"merging needs the states of all ranks of one group, each once; ranks {sorted(by_rank)} were given, "
            f"{missing} are missing, and (ranks, elements) are {sorted(sizes)}"
        )
    numel = states[0]["numel"]
    worker = torch.zeros(numel, dtype=torch.float32)
    server = torch.zeros(numel, dtype=torch.float32)
    for rank in range(world_size):
        state = by_rank[rank]
        worker += state["worker"].to("cpu", torch.float32)
        start = state["server_start"]
        server[start : start + state["server"].numel()] = state["server"].to("cpu", torch.float32)
    return {
        "form": "whole",
        "world_size": world_size,
        "numel": numel,
        "worker": worker / world_size,
        "server": server,
    }
