"""Reads the argument `config` of `initialize` into a dict: a file, a dict, JSON, or JSON in base64."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_engine.config.load.reader import MAX_DEPTH, ReadError, parse
from ds_engine.config.support.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """The content, and where it was read from."""

    where: str
    raw: dict[str, Any]
    lines: dict[str, int]


def open_source(config: object) -> Source:
    """Reads a configuration.

    Args:
        config: path of a file; a dict; a JSON string; or JSON in URL-safe base64, as launchers pass it.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it cannot be parsed.
    """
    if isinstance(config, Mapping):
        return Source("config", _plain(config), {})
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError([f"config is a {type(config).__name__}: pass the path of a JSON file, or a dict"])
    if isinstance(config, str) and (text := _inline(config)) is not None:
        return _parsed(text, "config")
    path = Path(config)
    try:
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, IsADirectoryError):
        there = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        listing = f"; {path.parent} has {', '.join(there)}" if there else ""
        raise FileNotFoundError(f"no configuration file {path}{listing}") from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"not UTF-8 text: {error.reason} at byte {error.start}"], str(path)) from None


def read(config: object) -> dict[str, Any]:
    """Returns the configuration as written: unchecked, with the names as written, without defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it cannot be parsed.
    """
    return open_source(config).raw


def _inline(config: str) -> str | None:
    """Parses JSON in the string itself, plain or in base64; None for a path."""
    if config.lstrip().startswith("{"):
        return config
    try:
        decoded = base64.urlsafe_b64decode(config.encode()).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
    # A path such as "data" may be valid base64 by chance, but does not decode to an object.
    return decoded if decoded.lstrip().startswith("{") else None


def _parsed(text: str, where: str) -> Source:
    try:
        document = parse(text)
    except ReadError as error:
        raise ConfigError(
            [f"not valid JSON: {error}" if "line" in str(error)[:4] else str(error)], where
        ) from None
    if not isinstance(document.value, dict):
        raise ConfigError([f"contains a {type(document.value).__name__}, not an object {{...}}"], where)
    return Source(where, document.value, document.lines)


def _plain(value: Any, depth: int = 0) -> Any:
    """Copies dicts and lists, and converts numbers of numpy and torch to Python's.

    Raises:
        ConfigError: the nesting is too deep, as in a dict that contains itself.
    """
    if depth > MAX_DEPTH:
        raise ConfigError([f"objects and lists are nested more than {MAX_DEPTH} levels deep"], "config")
    if isinstance(value, Mapping):
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, depth + 1) for inner in value]
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        return item()
    return value
