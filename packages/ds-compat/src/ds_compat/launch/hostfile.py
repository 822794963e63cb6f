"""Host files as `deepspeed.launcher.runner` returns them: host -> number of slots."""

from __future__ import annotations

from collections.abc import Sequence

from ds_engine.launch import hosts


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """Returns host -> number of slots; None if there is no such file. Errors as for `parse_hostfile`."""
    pool = hosts.fetch_hostfile(hostfile_path)
    return None if pool is None else {host: len(slots) for host, slots in pool.items()}


def parse_hostfile(hostfile_lines: Sequence[str]) -> dict[str, int]:
    """Returns host -> number of slots, for lines such as `worker-0 slots=4`.

    Raises:
        ValueError: a line is malformed, a host is listed twice, or there is none.
    """
    return {host: len(slots) for host, slots in hosts.parse_hostfile(hostfile_lines).items()}
