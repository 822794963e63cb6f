"""Bytes on the wire as pure functions of sizes: what one rank sends in a collective, without headers of packets.

The functions hold for the algorithms that this package and gloo use: direct exchange for all-to-all and all-gather,
a ring for all-reduce. NCCL's rings send the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence


def all_to_all_bytes(piece_bytes: Sequence[int], rank: int) -> int:
    """Bytes that rank `rank` sends: all pieces but its own."""
    return sum(piece_bytes) - piece_bytes[rank]


def all_gather_bytes(own_bytes: int, world_size: int) -> int:
    """Bytes that a rank sends if its piece has `own_bytes`."""
    return own_bytes * (world_size - 1)


def all_reduce_bytes(num_bytes: int, world_size: int) -> int:
    """Bytes that a rank sends for a tensor of `num_bytes`: 2 (W - 1) / W times as many, rounded up."""
    return -(-2 * (world_size - 1) * num_bytes // world_size)


def two_phase_bytes(part_bytes: Sequence[int], rank: int) -> int:
    """Bytes that rank `rank` sends in a compressed all-reduce whose parts have payloads of `part_bytes`.

    First phase: the payload of each other rank's part. Second phase: its own part's payload to every other rank. For W
    equal parts of a payload of P bytes this is 2 (W - 1) / W P; P is 1/32 of fp32 for signs, plus 4 bytes a block.
    """
    return all_to_all_bytes(part_bytes, rank) + all_gather_bytes(part_bytes[rank], len(part_bytes))


def bus_bytes(operation: str, num_bytes: int, world_size: int) -> float:
    """Bytes that the best algorithm sends from each rank in a collective of torch.distributed. By duration they are
    the "bus bandwidth", with the factors of nccl-tests: the root of a broadcast counts for all ranks.

    Args:
        operation: its name, such as "all_reduce"; unknown ones count as messages.
        num_bytes: of its largest tensor, or list of tensors, on one rank.
    """
    others = (world_size - 1) / world_size
    if operation == "all_reduce":
        return 2 * others * num_bytes
    if operation.startswith(("all_gather", "all_to_all", "reduce_scatter", "gather", "scatter")):
        return others * num_bytes
    return 0.0 if world_size == 1 else float(num_bytes)
