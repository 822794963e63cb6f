"""Slurm's compact lists: hosts like `gpu[01-03,07],login` and counts like `4(x2),3`."""

from __future__ import annotations

import re

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_nodes(text: str) -> list[str]:
    """Returns the host names of a Slurm node list, in order; numbers keep their leading zeros.

    `n[1-2,5]`, several brackets in one name (`r[1-2]n[1-2]`) and plain names, separated by commas. Raises
    ValueError for anything else.
    """
    hosts: list[str] = []
    for item in _split_outside_brackets(text.strip()):
        hosts.extend(_expand_item(item))
    if not hosts:
        raise ValueError("it is empty")
    return hosts


def expand_counts(text: str) -> list[int]:
    """Returns the numbers of a list in which `4(x2)` stands for 4,4. Raises ValueError for anything else."""
    counts: list[int] = []
    for item in text.strip().split(","):
        match = _COUNT.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{item!r} is not a count such as 4 or 4(x2)")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split_outside_brackets(text: str) -> list[str]:
    items, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth not in (0, 1):
            raise ValueError(f"brackets do not match at character {i}")
        if character == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    if depth:
        raise ValueError("a bracket is not closed")
    items.append(text[start:])
    if not all(item.strip() for item in items):
        raise ValueError("a name between commas is empty")
    return [item.strip() for item in items]


def _expand_item(item: str) -> list[str]:
    """Expands one item: a prefix, a bracket, and a rest that may contain further brackets, which vary fastest."""
    prefix, bracket, after = item.partition("[")
    if not bracket:
        return [item]
    inside, _, rest = after.partition("]")
    ends = _expand_item(rest) if rest else [""]
    return [
        f"{prefix}{number}{end}"
        for part in inside.split(",")
        for number in _expand_range(part)
        for end in ends
    ]


def _expand_range(part: str) -> list[str]:
    first, dash, last = part.strip().partition("-")
    last = last if dash else first
    if not (first.isdigit() and last.isdigit()) or int(last) < int(first):
        raise ValueError(f"{part!r} is not a number or a range such as 01-08")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
