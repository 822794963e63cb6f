"""Pieces of LAMB that 1-bit LAMB uses, whole and divided among ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_core.optim.base import NO_CORRECTION_STEP


def lamb_defaults(
    *,
    max_coeff: float,
    min_coeff: float,
    coeff_beta: float,
    factor_max: float,
    factor_min: float,
    factor_threshold: float,
) -> dict[str, float]:
    """Returns the group options of 1-bit LAMB besides those of Adam. Raises ValueError naming one out of range."""
    if not 0.0 <= min_coeff <= max_coeff or not 0.0 < factor_min <= 1.0 <= factor_max:
        raise ValueError(
            f"OneBitLamb needs 0 <= min_coeff <= max_coeff and 0 < factor_min <= 1 <= factor_max, but they are "
            f"{min_coeff}, {max_coeff}, {factor_min} and {factor_max}"
        )
    for key, value in (("coeff_beta", coeff_beta), ("factor_threshold", factor_threshold)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{key} must lie in [0, 1), but is {value}")
    return {
        "max_coeff": max_coeff,
        "min_coeff": min_coeff,
        "coeff_beta": coeff_beta,
        "factor_max": factor_max,
        "factor_min": factor_min,
        "factor_threshold": factor_threshold,
    }


def kernel_options(group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns the arguments of LAMB's kernels for update number `step`, from 1."""
    return {
        "step": step if group["bias_correction"] else NO_CORRECTION_STEP,
        "beta1": float(group["betas"][0]),
        "beta2": float(group["betas"][1]),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


def averaged_ratio(group: Mapping[str, Any], average: float | None, ratio: float) -> float | None:
    """Returns the moving average of trust ratios after one more; None: there was none so far. A ratio of 1 does not
    count: a norm was 0, as in the first update of a tensor of zeros.
    """
    if ratio == 1.0:
        return average
    before = ratio if average is None else average
    return float(group["coeff_beta"] * before + (1.0 - group["coeff_beta"]) * ratio)


def limited_factor(
    group: Mapping[str, Any], last: float, largest: float, direction_norm: float, change_norm: float
) -> float:
    """How much larger an update would be if the variance had not been frozen, within the group's limits
    (docs/notes/onebit.md: f).

    Args:
        group: the options.
        last: the factor of the update before.
        largest: of the elements' ratios of frozen and fresh root of the variance.
        direction_norm: of the update without weight decay.
        change_norm: of the update.
    """
    share = min(1.0, direction_norm / change_norm) if change_norm > 0.0 else 1.0
    factor, limit = largest * share + 1.0 - share, float(group["factor_threshold"])
    factor = min(max(factor, group["factor_min"]), group["factor_max"])
    factor = min(max(factor, last * (1.0 - limit)), last * (1.0 + limit))
    return factor if math.isfinite(factor) else last
