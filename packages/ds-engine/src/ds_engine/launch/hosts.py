"""Machines and their slots: host files, and the filters `--include` and `--exclude`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

Pool = dict[str, list[int]]
"""Host -> numbers of its slots."""


def fetch_hostfile(hostfile_path: str) -> Pool | None:
    """Returns host -> slots of a host file; None if there is no such file.

    Raises:
        ValueError: a line is malformed, or a host is listed twice.
    """
    path = Path(hostfile_path)
    return parse_hostfile(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else None


def parse_hostfile(lines: Sequence[str]) -> Pool:
    """Parses lines such as `worker-0 slots=4`; empty lines and comments (#) are ignored.

    Raises:
        ValueError: see `fetch_hostfile`.
    """
    pool: Pool = {}
    for line in lines:
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = re.match(r"^(\S+)\s+slots=(\d+)", text)
        if match is None:
            raise ValueError(f"Hostfile contains a bad entry: {line}, unable to proceed with launching")
        if match[1] in pool:
            raise ValueError(
                f"Hostfile contains multiple entries for {match[1]}, unable to proceed with launching"
            )
        pool[match[1]] = list(range(int(match[2])))
    if not pool:
        raise ValueError("Hostfile is empty or not formatted correctly, unable to proceed with launching.")
    return pool


def read_env_files(name: str) -> dict[str, str]:
    """Reads KEY=VALUE lines of the files of this name in the home and working directories; the latter has precedence.

    Raises:
        ValueError: a file is not UTF-8 text, or a line is not a valid environment variable; names file and line.
    """
    variables: dict[str, str] = {}
    for folder in (Path.home(), Path.cwd()):
        file = folder / name
        if file.is_file():
            try:
                lines = file.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file} is not text in UTF-8 ({error.reason} at byte {error.start})"
                ) from None
            for number, line in enumerate(lines, 1):
                key, equals, value = line.strip().partition("=")
                if equals and not key.startswith("#"):
                    if "\0" in line or not key:
                        raise ValueError(
                            f"{file}, line {number}: {line.strip()!r} cannot be an environment variable: write "
                            "KEY=VALUE without NUL characters"
                        )
                    variables[key] = value
    return variables


def parse_resource_filter(
    host_info: Mapping[str, list[int]], include_str: str = "", exclude_str: str = ""
) -> Pool:
    """Returns the hosts and slots that `NODE[:SLOT[,SLOT]...][@NODE...]` includes or does not exclude, in the order
    of `host_info`.

    Raises:
        ValueError: both filters are given, or a host or slot does not exist.
    """
    if include_str and exclude_str:
        raise ValueError("include_str and exclude_str are mutually exclusive.")
    if not include_str and not exclude_str:
        return dict(host_info)
    named: dict[str, list[int]] = {}
    for node in (include_str or exclude_str).split("@"):
        host, _, slots = node.strip().partition(":")
        if host not in host_info:
            raise ValueError(f"Hostname '{host}' not found in hostfile")
        numbers = (
            list(dict.fromkeys(int(slot) for slot in slots.split(","))) if slots else list(host_info[host])
        )
        for slot in numbers:
            if slot not in host_info[host]:
                raise ValueError(f"No slot '{slot}' specified on host '{host}'")
        named[host] = sorted({*named.get(host, []), *numbers})
    kept = {
        host: named.get(host, []) if include_str else [s for s in slots if s not in named.get(host, [])]
        for host, slots in host_info.items()
    }
    return {host: slots for host, slots in kept.items() if slots}
