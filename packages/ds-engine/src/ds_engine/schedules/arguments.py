"""Command-line arguments for schedules: `--lr_schedule`, and one argument for each setting."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

_RANGE_TEST: Mapping[str, Any] = {
    "lr_range_test_min_lr": 0.001,
    "lr_range_test_step_rate": 1.0,
    "lr_range_test_step_size": 1000,
    "lr_range_test_staircase": False,
}
_ONE_CYCLE: Mapping[str, Any] = {
    "cycle_first_step_size": 1000,
    "cycle_first_stair_count": -1,
    "cycle_second_step_size": -1,
    "cycle_second_stair_count": -1,
    "decay_step_size": 1000,
    "cycle_min_lr": 0.01,
    "cycle_max_lr": 0.1,
    "decay_lr_rate": 0.0,
    "cycle_momentum": False,
    "cycle_min_mom": 0.8,
    "cycle_max_mom": 0.9,
    "decay_mom_rate": 0.0,
}
_WARMUP: Mapping[str, Any] = {
    "warmup_min_lr": 0.0,
    "warmup_max_lr": 0.001,
    "warmup_num_steps": 1000,
    "warmup_type": "log",
}
_COSINE: Mapping[str, Any] = {
    "warmup_num_steps": 1000,
    "warmup_type": "log",
    "warmup_min_ratio": 0.01,
    "cos_min_ratio": 0.01,
}
_TOTAL: Mapping[str, Any] = {"total_num_steps": None}

ARGUMENTS: Mapping[str, Any] = {**_RANGE_TEST, **_ONE_CYCLE, **_WARMUP, **_COSINE, **_TOTAL}
"""Name -> default of its argument, as on DeepSpeed's command line, whose defaults differ from those of the schedules.
-1 stands for the default of the schedule.
"""

SETTINGS: Mapping[str, tuple[str, ...]] = {
    "LRRangeTest": tuple(_RANGE_TEST),
    "OneCycle": tuple(_ONE_CYCLE),
    "WarmupLR": tuple(_WARMUP),
    "WarmupDecayLR": (*_WARMUP, *_TOTAL),
    "WarmupCosineLR": (*_COSINE, *_TOTAL),
}
"""Schedule -> names of its arguments."""


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds `--lr_schedule` and the arguments of all schedules, and returns the parser."""
    group = parser.add_argument_group("Convergence Tuning", "Learning-rate schedule")
    group.add_argument("--lr_schedule", default=None, help="name of the schedule")
    for name, default in ARGUMENTS.items():
        of = ", ".join(schedule for schedule, settings in SETTINGS.items() if name in settings)
        if default is False:
            group.add_argument(f"--{name}", action="store_true", help=f"of {of}")
        else:
            kind = int if default is None else type(default)
            group.add_argument(f"--{name}", type=kind, default=default, help=f"of {of}")
    return parser


def override_params(args: argparse.Namespace, params: dict[str, Any], schedule: str | None = None) -> None:
    """Copies command-line values into `params`, for one schedule or for all."""
    for name in SETTINGS[schedule] if schedule is not None else ARGUMENTS:
        value = getattr(args, name, None)
        if value is None or (value == -1 and ARGUMENTS[name] == -1):
            continue
        params[name] = value


def get_config_from_args(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str | None]:
    """Makes the section `scheduler` from the command line.

    Returns:
        The section and None; or None and the reason if there is none.
    """
    name = getattr(args, "lr_schedule", None)
    if name is None:
        return None, "--lr_schedule not specified on command line"
    if name not in SETTINGS:
        return None, f"{name} is not a supported LR schedule: there are {', '.join(SETTINGS)}"
    params: dict[str, Any] = {}
    override_params(args, params, name)
    return {"type": name, "params": params}, None
