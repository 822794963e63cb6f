"""Explains a configuration: every value, and its origin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_engine.config.built import State, effectless, row_of
from ds_engine.config.load import auto
from ds_engine.config.sections.model import DsConfig
from ds_engine.config.sections.schema import ANY, every_key, given, value_at
from ds_engine.config.support.batch import MICRO, STEPS, TRAIN
from ds_engine.config.support.section import Section


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value."""

    path: str
    value: Any
    origin: str
    """"line 7", "config", "default", an equation, ..."""
    note: str = ""
    """Remark, or empty."""


def explain(config: DsConfig, *, ranks: int | None = None, defaults: bool = False) -> list[Setting]:
    """Returns every value that was set or derived, in the order of the schema.

    Args:
        ranks: number of data-parallel ranks, for the batch sizes; None: they are shown as set.
        defaults: include keys that were not set, with their defaults.

    Raises:
        ConfigError: the batch sizes do not fit that number of ranks.
    """
    settings = {setting.path: setting for setting in _given(config)}
    for path in config.origin.autos:
        why = (
            "needs a value"
            if path not in auto.defaults(config)
            else "the default, unless an integration replaces it"
        )
        settings[path] = Setting(path=path, value=value_at(config, path), origin='"auto"', note=why)
    settings.update({setting.path: setting for setting in _derived(config, ranks)})
    if defaults:
        for key in every_key():
            row = row_of(key.path)
            if key.path in settings or key.section is not None or ANY in key.path or row is None:
                continue
            if row.state is State.WORKS:
                value = value_at(config, key.path)
                settings[key.path] = Setting(path=key.path, value=value, origin="default")
    order = {key.path: place for place, key in enumerate(every_key())}
    return sorted(settings.values(), key=lambda s: (_place(order, s.path), s.path))


def _place(order: Mapping[str, int], path: str) -> int:
    while path and path not in order:
        path = path.rpartition(".")[0]
    return order.get(path, -1)


def _given(config: DsConfig) -> list[Setting]:
    origin, idle = config.origin, effectless(config)
    names = {new: old for old, new in origin.renamed.items()}
    settings = []
    for path in given(config):
        line = origin.line(path)
        who = f"line {line}" if line is not None else origin.where
        if path in names:
            who += f', as "{names[path]}"'
        note = f"no effect: {idle[path]}" if path in idle else ""
        value = value_at(config, path) if ANY not in path else None
        if isinstance(value, dict) and value and path.rpartition(".")[2] == "params":
            settings += [
                Setting(path=f"{path}.{name}", value=inner, origin=_who(config, f"{path}.{name}"), note=note)
                for name, inner in value.items()
            ]
        else:
            settings.append(Setting(path=path, value=value, origin=who, note=note))
    settings += [
        Setting(path=path, value=None, origin=_who(config, path), note=f"ignored: {why}")
        for path, why in origin.ignored.items()
    ]
    return settings


def _who(config: DsConfig, path: str) -> str:
    line = config.origin.line(path)
    return f"line {line}" if line is not None else config.origin.where


def _derived(config: DsConfig, ranks: int | None) -> list[Setting]:
    settings = []
    zero = config.zero_optimization
    if ranks is not None:
        batch = config.batch(ranks)
        values = {TRAIN: batch.train, MICRO: batch.micro, STEPS: batch.steps}
        equation = f"train {batch.train} = micro {batch.micro} x steps {batch.steps} x {ranks} ranks"
        equation += ", by elasticity" if config.elasticity.enabled else ""
        settings += [
            Setting(path=path, value=value, origin=f"derived: {equation}")
            for path, value in values.items()
            if getattr(config, path) is None or config.elasticity.enabled
        ]
    if zero.accumulation_plan is None:
        plan = "local" if zero.stage < 2 else "sharded"
        settings.append(
            Setting(
                path="zero_optimization.accumulation_plan",
                value=plan,
                origin=f"derived: default of stage {zero.stage}",
            )
        )
    if "gradient_clipping" not in config.model_fields_set and "gradient_clipping" not in config.origin.autos:
        settings.append(
            Setting(
                path="gradient_clipping",
                value=config.gradient_clipping,
                origin="default",
                note="0 turns it off",
            )
        )
    return settings


def table(settings: list[Setting]) -> str:
    """Returns the settings as aligned text."""
    rows = [(s.path, _shown(s.value), s.origin + (f"; {s.note}" if s.note else "")) for s in settings]
    rows.insert(0, ("key", "value", "set by"))
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in rows)


def _shown(value: Any) -> str:
    if isinstance(value, Section):
        value = value.model_dump(exclude_unset=True)
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
