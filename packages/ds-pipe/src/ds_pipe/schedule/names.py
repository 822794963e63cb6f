"""Schedules by name."""

from __future__ import annotations

from difflib import get_close_matches

from ds_pipe.errors import ScheduleError
from ds_pipe.schedule.dualpipev import dualpipev
from ds_pipe.schedule.interleaved import interleaved
from ds_pipe.schedule.one_chunk import gpipe, inference, one_f_one_b
from ds_pipe.schedule.placement import looped, v_shaped
from ds_pipe.schedule.schedule import Schedule
from ds_pipe.schedule.zero_bubble import Times, zb_h1, zb_h2, zb_v

TRAINING = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipev")
"""Names of the schedules that train."""
NAMES = (*TRAINING, "inference")
"""All names."""


def make(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    chunks: int | None = None,
    times: Times | None = None,
    max_activations: int | None = None,
) -> Schedule:
    """Returns a schedule by its name.

    Args:
        name: one of `NAMES`.
        num_ranks: number of pipeline ranks.
        num_microbatches: number of micro-batches in one step.
        chunks: number of stages on each rank, for "interleaved" (default 2) and "inference" (default 1).
        times: times of forward, backward for the input and backward for the weights of each stage, to which zero-bubble
            schedules are fitted. Default: all are equal.
        max_activations: number of activations that a rank may keep, for "zb-v".

    Raises:
        ScheduleError: an unknown name, or numbers that the schedule cannot have.
    """
    if num_ranks < 1 or num_microbatches < 1:
        raise ScheduleError(
            f"{num_ranks} ranks and {num_microbatches} micro-batches: a schedule needs at least one of each"
        )
    if chunks is not None and (chunks < 1 or name not in ("interleaved", "inference")):
        raise ScheduleError(
            f"chunks={chunks} for {name}: only interleaved and inference take chunks, at least 1"
        )
    if max_activations is not None and name != "zb-v":
        raise ScheduleError(f"max_activations={max_activations} for {name}: only zb-v takes it")
    if name == "gpipe":
        return gpipe(num_ranks, num_microbatches)
    if name == "1f1b":
        return one_f_one_b(num_ranks, num_microbatches)
    if name == "interleaved":
        return interleaved(num_ranks, num_microbatches, 2 if chunks is None else chunks)
    if name == "zb-h1":
        return zb_h1(num_ranks, num_microbatches, times)
    if name == "zb-h2":
        return zb_h2(num_ranks, num_microbatches, times)
    if name == "zb-v":
        return zb_v(num_ranks, num_microbatches, times, max_activations)
    if name == "dualpipev":
        return dualpipev(num_ranks, num_microbatches)
    if name == "inference":
        return inference(num_ranks, num_microbatches, chunks or 1)
    close = get_close_matches(name, NAMES, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ScheduleError(f"there is no schedule {name!r}{hint} Schedules are: {', '.join(NAMES)}")


def placement(name: str, num_ranks: int, chunks: int | None = None) -> tuple[int, ...]:
    """Returns the rank of every stage in the schedule of this name."""
    if name in ("zb-v", "dualpipev"):
        return v_shaped(num_ranks)
    return looped(num_ranks, stages_per_rank(name, chunks))


def stages_per_rank(name: str, chunks: int | None = None) -> int:
    """Returns how many stages each rank has in the schedule of this name."""
    if name in ("zb-v", "dualpipev"):
        return 2
    return chunks or (2 if name == "interleaved" else 1)
