"""The table of all rows, and its queries."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from ds_engine.config.built import experts, top, zero
from ds_engine.config.built.row import Inert, Row, State
from ds_engine.config.sections.schema import by_path, default_of, every_key, given, keys_of, value_at

BUILT: Mapping[str, Row] = {row.key: row for row in top.ROWS + zero.ROWS + experts.ROWS}
"""Dotted path -> row."""


@cache
def row_of(path: str) -> Row | None:
    """Returns the row of a key: its own, or that of the nearest section around it."""
    while path:
        if path in BUILT:
            return BUILT[path]
        path = path.rpartition(".")[0]
    return None


def switches(row: Row) -> Mapping[str, Inert]:
    """Returns path -> values that turn the feature off. The default of a key that may be null is one of them."""
    if row.switches:
        return {path: values + _if_null(path) for path, values in row.switches.items()}
    key = by_path()[row.key]
    if key.section is not None and default_of(key) is not None:
        inner = keys_of(key.section, row.key)
        assert "enabled" in inner, f"{row.key} has no key `enabled`: its row must name the switches"
        return {f"{row.key}.enabled": (False,)}
    return {row.key: (default_of(key),)}


def _if_null(path: str) -> Inert:
    key = by_path().get(path)
    return (None,) if key is not None and default_of(key) is None else ()


def refusals(config: Any) -> Iterator[tuple[str, str]]:
    """Yields path and sentence for each configured feature that is not supported."""
    for row in BUILT.values():
        if row.only is not None and not row.only(config):
            continue
        if row.state in (State.LATER, State.GONE) or row.needs:
            for path, inert in switches(row).items():
                value = value_at(config, path)
                if any(value is quiet or _equal(value, quiet) for quiet in inert):
                    continue
                if row.state is State.WORKS and importlib.util.find_spec(row.needs) is not None:
                    continue
                yield path, _refusal(row, path, value)


@cache
def common_row(path: str) -> Row | None:
    """Returns the row of a section if all keys in it have the same state; None if they differ, or have no row."""
    inside = [key.path for key in every_key() if key.path.startswith(f"{path}.") and key.section is None]
    rows = [row_of(name) for name in inside]
    states = {row.state if row is not None else None for row in rows}
    return row_of(path) if len(states) == 1 else None


def unbuilt_values(path: str) -> Row | None:
    """Returns the row that refuses some values of a key which otherwise works."""
    rows = (row for row in BUILT.values() if row.state in (State.LATER, State.GONE) and row.key != path)
    return next((row for row in rows if path in row.switches), None)


def _equal(value: Any, quiet: Any) -> bool:
    """Compares values so that 1 is not equal to True."""
    return isinstance(value, bool) == isinstance(quiet, bool) and value == quiet


def _refusal(row: Row, path: str, value: Any) -> str:
    shown = f"{path} is {json.dumps(value, default=repr)}"
    if len(shown) > 120:
        shown = f"{path} is set"
    remedy = row.remedy or ("set it to false" if value is True else "remove it")
    if row.state is State.WORKS:
        return (
            f"{shown}: this needs {row.owner}, which is not installed; pip install {row.owner}, or {remedy}"
        )
    if row.state is State.GONE:
        return f"{shown}: ds does not support {row.why}; {remedy}"
    return f"{shown}: this version does not support {row.why} yet, which {row.owner} will add; {remedy}"


def effectless(config: Any) -> Mapping[str, str]:
    """Returns path -> reason for every key that was set and has no effect."""
    reasons = {}
    for path in given(config):
        row = row_of(path)
        if row is None:
            continue
        if row.state is State.NO_EFFECT:
            reasons[path] = row.why
        elif row.only is not None and not row.only(config):
            reasons[path] = row.otherwise
    return reasons
