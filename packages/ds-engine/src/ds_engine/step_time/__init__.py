"""How long a step takes, from the work of each unit and the rates of the machine: arithmetic, without torch."""

from ds_engine.step_time.rates import Link, Rates, RatesError, read_rates
from ds_engine.step_time.simulate import StepTime, Unit, Workload, seconds_text, simulate

__all__ = [
    "Link",
    "Rates",
    "RatesError",
    "StepTime",
    "Unit",
    "Workload",
    "read_rates",
    "seconds_text",
    "simulate",
]
