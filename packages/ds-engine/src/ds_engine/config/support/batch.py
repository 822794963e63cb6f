"""Batch arithmetic: train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x
ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_engine.config.support.errors import ConfigError

TRAIN, MICRO, STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The batch sizes of a job. `train == micro * steps * ranks` always holds."""

    train: int
    """Number of samples per optimizer step over all ranks."""
    micro: int
    """Number of samples per forward pass on one rank."""
    steps: int
    """Number of micro-batches per optimizer step."""
    ranks: int
    """Number of data-parallel ranks."""


def resolve(train: int | None, micro: int | None, steps: int | None, ranks: int) -> Batch:
    """Computes the sizes that are not given.

    Raises:
        ConfigError: too few sizes are given, or the equation has no solution in whole numbers. The message contains
            the numbers and the nearest valid ones.
    """
    if train is None and micro is None:
        raise ConfigError(
            [f"set {TRAIN} or {MICRO} (samples per step over all ranks, or per forward pass on one rank)"]
        )
    if train is None:
        assert micro is not None
        steps = steps or 1
        return Batch(train=micro * steps * ranks, micro=micro, steps=steps, ranks=ranks)
    if micro is not None and steps is not None:
        if train != micro * steps * ranks:
            raise ConfigError([_contradiction(train, micro, steps, ranks)])
        return Batch(train=train, micro=micro, steps=steps, ranks=ranks)
    if micro is not None:
        return Batch(
            train=train, micro=micro, steps=_quotient(train, MICRO, micro, STEPS, ranks), ranks=ranks
        )
    steps = steps or 1
    return Batch(train=train, micro=_quotient(train, STEPS, steps, MICRO, ranks), steps=steps, ranks=ranks)


def _quotient(train: int, known: str, value: int, wanted: str, ranks: int) -> int:
    """Returns `train / (value * ranks)`. Raises ConfigError unless it is a whole number of at least 1."""
    unit = value * ranks
    if train % unit == 0:
        return train // unit
    below, above = train // unit * unit, (train // unit + 1) * unit
    works = [f"{TRAIN} {n} ({wanted} {n // unit})" for n in (below, above) if n > 0]
    others = [n for n in _nearest_divisors(train, value, ranks) if n != value]
    works += [f"{known} {n} ({wanted} {train // (n * ranks)})" for n in others]
    raise ConfigError(
        [
            f"{TRAIN} {train} = {known} {value} x {wanted} ? x ranks {ranks} has no whole solution: {train} "
            f"/ {unit} = {train / unit:g}. "
            f"Nearest settings that work: {'; or '.join(works)}"
        ]
    )


def _contradiction(train: int, micro: int, steps: int, ranks: int) -> str:
    product = micro * steps * ranks
    works = [f"{TRAIN} {product}"]
    if train % (micro * ranks) == 0:
        works.append(f"{STEPS} {train // (micro * ranks)}")
    if train % (steps * ranks) == 0:
        works.append(f"{MICRO} {train // (steps * ranks)}")
    return (
        f"{TRAIN} {train} is not {MICRO} {micro} x {STEPS} {steps} x ranks {ranks} = {product}. "
        f"Change one of them: {'; or '.join(works)}; or remove one, so that it is computed"
    )


def _nearest_divisors(train: int, value: int, ranks: int) -> list[int]:
    """Returns the divisors of `train / ranks` next to `value` on either side."""
    if train % ranks:
        return []
    share = train // ranks
    divisors = [n for n in range(1, min(share, 4096) + 1) if share % n == 0]
    below = [n for n in divisors if n <= value][-1:]
    above = [n for n in divisors if n > value][:1]
    return below + above


def contradictions(train: int | None, micro: int | None, steps: int | None) -> list[tuple[str, str]]:
    """Returns mistakes that exist for any number of ranks, as key and sentence."""
    given = {TRAIN: train, MICRO: micro, STEPS: steps}
    unit = (micro or 1) * (steps or 1)
    if train is None or train % unit == 0:
        return []
    factors = " x ".join(f"{name} {value or '?'}" for name, value in given.items() if name != TRAIN)
    below, above = train // unit * unit, (train // unit + 1) * unit
    works = " or ".join(str(n) for n in (below, above) if n > 0)
    return [
        (
            TRAIN,
            f"{TRAIN} {train} = {factors} x ranks has no whole solution, on any number of ranks: it must be a "
            f"multiple of {unit}, such as {works}",
        )
    ]
