"""Checks that numeric arguments of optimizers and schedules are numbers. They are not keys of the schema.

Optimizers would fail on `"lr": "3e-4"` late, inside a step, or not at all. So it is refused here, with its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ds_engine.config.load.violations import shown

SECTIONS = ("optimizer.params", "scheduler.params")

NUMBERS = frozenset(
    {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "momentum",
        "dampening",
        "lr_decay",
        "initial_accumulator_value",
        "max_coeff",
        "min_coeff",
        "muon_lr",
        "adam_lr",
        "ns_steps",
        "max_grad_norm",
        "warmup_num_steps",
        "warmup_min_lr",
        "warmup_max_lr",
        "warmup_min_ratio",
        "cos_min_ratio",
        "total_num_steps",
        "last_batch_iteration",
        "cycle_min_lr",
        "cycle_max_lr",
        "decay_lr_rate",
        "cycle_first_step_size",
        "cycle_second_step_size",
        "cycle_first_stair_count",
        "cycle_second_stair_count",
        "decay_step_size",
        "cycle_min_mom",
        "cycle_max_mom",
        "decay_mom_rate",
        "lr_range_test_min_lr",
        "lr_range_test_step_size",
        "lr_range_test_step_rate",
    }
)
"""Arguments that are numbers, or lists of numbers, in every optimizer and schedule that has them."""

_NUMBER_AS_TEXT = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def mistakes(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields path and sentence for each argument that should be a number and is not."""
    for path in SECTIONS:
        section, _, name = path.partition(".")
        holder = raw.get(section)
        params = holder.get(name) if isinstance(holder, dict) else None
        for key, value in params.items() if isinstance(params, dict) else ():
            remedy = _remedy(value, meant=key in NUMBERS)
            if remedy:
                yield f"{path}.{key}", f"{path}.{key} is {shown(value)}: {remedy}"


def _remedy(value: Any, *, meant: bool) -> str:
    """Returns what the value must be instead; empty if it is valid."""
    if isinstance(value, (list, tuple)):
        return next((remedy for item in value if (remedy := _remedy(item, meant=meant))), "")
    if isinstance(value, str) and _NUMBER_AS_TEXT.fullmatch(value):
        return "it must be a number: remove the quotes"
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return "it must be a number below 2^63"
    if meant and value != "auto" and isinstance(value, (str, bool, dict)):
        return "it must be a number"
    return ""
