"""Writes values as YAML that every reader understands alike: each text is a double-quoted scalar in ASCII."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_WORD = re.compile("[A-Za-z]+")
_OTHER_TYPES = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""Words that YAML 1.1 reads as a boolean or null."""

Value = str | int | Mapping[str, "Value"] | Sequence["Value"]


def lines(value: Value, indent: str = "") -> list[str]:
    """Returns the lines of a mapping or list."""
    written: list[str] = []
    if isinstance(value, Mapping):
        for key, inner in value.items():
            written += _entry(f"{indent}{_key(key)}:", inner, f"{indent}  ")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            written += _item(inner, indent)
    return written


def _entry(start: str, value: Value, indent: str) -> list[str]:
    if isinstance(value, str | int):
        return [f"{start} {scalar(value)}"]
    if not value:
        return [f"{start} {'{}' if isinstance(value, Mapping) else '[]'}"]
    return [start, *lines(value, indent)]


def _item(value: Value, indent: str) -> list[str]:
    if isinstance(value, str | int) or not value:
        return _entry(f"{indent}-", value, indent)
    inner = lines(value, f"{indent}  ")
    return [f"{indent}- {inner[0].lstrip()}", *inner[1:]]


def _key(key: str) -> str:
    return key if _WORD.fullmatch(key) and key.lower() not in _OTHER_TYPES else scalar(key)


def scalar(value: str | int) -> str:
    """Returns a number, or a text in double quotes."""
    if isinstance(value, int):
        return str(value)
    return '"' + "".join(map(_character, value)) + '"'


def _character(character: str) -> str:
    code = ord(character)
    if character in '"\\':
        return f"\\{character}"
    if 32 <= code < 127:
        return character
    # JSON's pairs of surrogates are two characters for some readers of YAML.
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
