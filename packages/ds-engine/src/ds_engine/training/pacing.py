"""Settings of forward that change in the course of training: sequence length, and the probability of keeping a layer.

They are pure functions of the step, so checkpoints need not contain them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ds_engine.config.support.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from ds_engine.config.sections.data.curriculum import (
        CurriculumMetricConfig,
        CurriculumScheduleConfig,
        LegacyCurriculumConfig,
    )
    from ds_engine.config.sections.model import DsConfig
    from ds_engine.interfaces import TokenDropper

Difficulty = Callable[[int], float]
"""A function from the step, counted from 1, to the difficulty."""


def keep_share(step: int, theta: float, gamma: float) -> float:
    """Returns the fraction of layers that is kept after `step` optimizer steps: (1 - theta) exp(-gamma step) + theta.

    Source: Zhang and He, Accelerating Training of Transformer-Based Language Models with Progressive Layer
    Dropping (2020), equation 6.
    """
    return (1.0 - theta) * math.exp(-gamma * step) + theta


def growing(step: int, *, low: float, high: float, total: int, multiple: int, degree: int = 1) -> int | float:
    """Returns a difficulty that grows from `low` to `high` in `total` steps along a root of `degree`. It is rounded
    down to a multiple of `multiple`, but not below the first multiple from `low` on. `fixed_linear` is degree 1.

    Source: Li et al., The Stability-Efficiency Dilemma (2022), section 4.
    """
    reached = math.floor(math.pow(step / total, 1.0 / degree) * (high - low) + low)
    least = (
        -(-low // multiple) * multiple
    )  # with multiples of 16, a start at 8 would give sequences without tokens
    return min(max(reached - reached % multiple, least), high)


def discrete(step: int, difficulties: list[float], last_steps: list[int]) -> float:
    """Returns the difficulty of the first range whose last step is not before `step`."""
    for difficulty, last in zip(difficulties, last_steps, strict=False):
        if step <= last:
            return difficulty
    return difficulties[-1]


def schedule(
    section: LegacyCurriculumConfig | CurriculumMetricConfig, where: str = "curriculum_learning"
) -> Difficulty | None:
    """Returns the schedule of a section; None for `custom`, for which the user sets a function.

    Args:
        where: path of the section, for errors.

    Raises:
        ConfigError: numbers of the schedule are missing or contradict each other.
    """
    numbers, kind = section.schedule_config, section.schedule_type
    low, high = section.min_difficulty, section.max_difficulty
    if low is None or high is None:
        raise ConfigError(
            [f"{where}: set min_difficulty and max_difficulty, the first and the last difficulty"]
        )
    if low > high:
        raise ConfigError([f"{where}: min_difficulty {low} is above max_difficulty {high}"])
    if kind == "custom":
        return None
    if kind == "fixed_discrete":
        _need(numbers, kind, where, "difficulty", "max_step")
        difficulties, last_steps = [_plain(d) for d in numbers.difficulty or ()], numbers.max_step or []
        if len(difficulties) != len(last_steps) + 1:
            raise ConfigError(
                [
                    f"{where}.schedule_config: {len(difficulties)} difficulties need {len(difficulties) - 1} "
                    f"values of max_step, because the last difficulty has no end; there are {len(last_steps)}"
                ]
            )
        return lambda step: discrete(step, difficulties, last_steps)
    _need(
        numbers,
        kind,
        where,
        "total_curriculum_step",
        "difficulty_step",
        *(["root_degree"] if kind == "fixed_root" else []),
    )
    total, multiple, degree = (
        numbers.total_curriculum_step or 1,
        numbers.difficulty_step or 1,
        numbers.root_degree or 1,
    )
    low, high = _plain(low), _plain(high)
    return lambda step: growing(step, low=low, high=high, total=total, multiple=multiple, degree=degree)


def _plain(number: float) -> float:
    """Converts an integral float to int, because lengths are used as indices."""
    return int(number) if float(number).is_integer() else number


def _need(numbers: CurriculumScheduleConfig, kind: str, where: str, *names: str) -> None:
    missing = [name for name in names if getattr(numbers, name) is None]
    if missing:
        said = f"{where}.schedule_config: {kind} needs {' and '.join(missing)}"
        raise ConfigError([said])


class Pacing:
    """Computes additional keyword arguments of the module's forward in training mode."""

    def __init__(self, config: DsConfig) -> None:
        """ConfigError: numbers of the schedule are missing or contradict each other."""
        self._drop = config.progressive_layer_drop if config.progressive_layer_drop.enabled else None
        self._curriculum = config.curriculum_learning.enabled
        self._difficulty = schedule(config.curriculum_learning) if self._curriculum else None
        routing = config.data_efficiency.data_routing
        on = config.data_efficiency.enabled and routing.enabled and routing.random_ltd.enabled
        self._ltd = routing.random_ltd if on else None
        self.dropping: TokenDropper | None = None
        """The token dropper; None before `drop_tokens` was called."""

    def set_difficulty(self, difficulty: Difficulty) -> None:
        """Sets the function of `"schedule_type": "custom"`.

        Raises:
            ValueError: curriculum_learning is not enabled.
        """
        if not self._curriculum:
            raise ValueError(
                "curriculum_learning.enabled is false, so this function would never be called: set it to true"
            )
        self._difficulty = difficulty

    def drop_tokens(
        self, model: nn.Module, kind: type[nn.Module], along: Sequence[str] | None = None
    ) -> TokenDropper:
        """Sets the layers of `data_efficiency.data_routing.random_ltd`: those of class `kind` in `model`.
        `random_ltd_layer_id` contains the indices, from 0, of the layers that drop tokens.

        Args:
            along: names of arguments of a layer's forward, other than the mask, with one entry per token. Default:
                `position_ids` and `position_embeddings`.

        Raises:
            ValueError: random_ltd is not enabled, or the layers do not match the configuration.
        """
        from ds_engine.build.layers import token_dropper

        section = self._ltd
        if section is None:
            raise ValueError(
                "data_efficiency.data_routing.random_ltd is not enabled: set its key enabled, and "
                "those of the sections around it, to true"
            )
        layers = [module for module in model.modules() if isinstance(module, kind)]
        chosen, total = section.random_ltd_layer_id or [], section.total_layer_num
        if total not in (None, len(layers)) or max(chosen) >= len(layers):
            raise ValueError(
                f"the model has {len(layers)} layers {kind.__name__}; random_ltd has total_layer_num {total} and "
                f"random_ltd_layer_id {chosen}, whose indices start at 0"
            )
        self.close()
        self.dropping = token_dropper([layers[i] for i in chosen], section, along)
        return self.dropping

    def close(self) -> None:
        """Makes the layers process all tokens again."""
        if self.dropping is not None:
            self.dropping.remove()
            self.dropping = None

    def kept_tokens(self, steps: int) -> int:
        """Number of tokens that dropping layers process after `steps` optimizer steps."""
        assert self._ltd is not None
        growth = self._ltd.random_ltd_schedule
        numbers = growth.schedule_config
        return int(
            growing(
                steps,
                low=growth.min_value or 1,
                high=growth.max_value or 1,
                total=numbers.require_steps or 1,
                multiple=numbers.seq_per_step or 1,
            )
        )

    def arguments(self, steps: int) -> dict[str, Any]:
        """Returns the keyword arguments of forward after `steps` optimizer steps: `curriculum_seqlen`,
        `progressive_layer_drop` and `pld_theta`, each if enabled.
        """
        made: dict[str, Any] = {}
        if self._ltd is not None:
            if self.dropping is None:
                raise ValueError(
                    "data_efficiency.data_routing.random_ltd is enabled, but the layers that drop tokens are not "
                    "set: call "
                    "engine.pacing.drop_tokens(engine.module, ClassOfLayers) before the first forward"
                )
            self.dropping.kept = self.kept_tokens(steps)
        if self._drop is not None:
            made["progressive_layer_drop"] = True
            made["pld_theta"] = keep_share(steps, self._drop.theta, self._drop.gamma)
        if self._curriculum:
            if self._difficulty is None:
                raise ValueError(
                    'curriculum_learning.schedule_type is "custom": set its function with '
                    "engine.pacing.set_difficulty(lambda step: ...) before the first forward"
                )
            made["curriculum_seqlen"] = self._difficulty(steps + 1)
        return made
