"""What training costs, from the time of a step and the price of a rank."""

from __future__ import annotations

from dataclasses import dataclass

from ds_engine.step_time.rates import Rates
from ds_engine.step_time.simulate import seconds_text

_HOUR = 3600.0
_MILLION = 1e6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Amounts in the currency of `Rates.price_per_rank_hour`."""

    ranks: int
    price_per_rank_hour: float
    step: float
    """Of one optimizer step."""
    per_million_samples: float
    per_million_tokens: float | None
    """None if the model takes no tokens."""
    run: float | None
    """Of all steps of the run; None if their number is not known."""
    run_s: float | None
    """How long they take."""

    def lines(self) -> list[str]:
        """The amounts as text."""
        each = f"cost of {self.ranks} ranks at {self.price_per_rank_hour:g} an hour: "
        each += f"{self.step:.3g} a step, "
        if self.per_million_tokens is None:
            each += f"{self.per_million_samples:.4g} for a million samples"
        else:
            each += f"{self.per_million_tokens:.4g} for a million tokens"
        if self.run is None or self.run_s is None:
            return [each]
        return [each, f"the whole run: {duration_text(self.run_s)}, {self.run:,.2f}"]


def cost_of(
    step_s: float, rates: Rates, *, ranks: int, samples: int, tokens: int | None, steps: int | None
) -> Cost | None:
    """Returns the cost of a training; None without a price.

    Args:
        step_s: duration of an optimizer step.
        ranks: of the whole job.
        samples: of a step on all ranks together.
        tokens: of a sample.
        steps: of the run.
    """
    if not rates.price_per_rank_hour:
        return None
    step = step_s / _HOUR * ranks * rates.price_per_rank_hour
    per_sample = step / samples
    return Cost(
        ranks=ranks,
        price_per_rank_hour=rates.price_per_rank_hour,
        step=step,
        per_million_samples=per_sample * _MILLION,
        per_million_tokens=None if tokens is None else per_sample / tokens * _MILLION,
        run=None if steps is None else steps * step,
        run_s=None if steps is None else steps * step_s,
    )


def duration_text(seconds: float) -> str:
    """A long time: "3.2 days", "5.1 hours", or as `seconds_text`."""
    for scale, unit in ((24 * _HOUR, "days"), (_HOUR, "hours"), (60.0, "minutes")):
        if seconds >= scale:
            return f"{seconds / scale:.1f} {unit}"
    return seconds_text(seconds)
