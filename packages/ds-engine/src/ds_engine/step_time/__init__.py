"""How long a step takes, from the work of each unit and the rates of the machine: arithmetic, without torch."""

from ds_engine.step_time.cost import Cost, cost_of
from ds_engine.step_time.rates import Link, Rates, RatesError, read_rates
from ds_engine.step_time.simulate import AxisTime, Inside, StepTime, Unit, Workload, seconds_text, simulate

__all__ = [
    "AxisTime",
    "Cost",
    "Inside",
    "Link",
    "Rates",
    "RatesError",
    "StepTime",
    "Unit",
    "Workload",
    "cost_of",
    "read_rates",
    "seconds_text",
    "simulate",
]
