"""Predicts the memory of a job: `plan` before it starts, and a check at the start of each run. Both call
`ds_zero.plan` for the same `Job`.
"""

from ds_engine.build.memory.check import warn_if_too_large
from ds_engine.build.memory.plan import Planned, load_factory
from ds_engine.build.memory.predict import placed
from ds_engine.build.memory.refuse import refuse_if_impossible

__all__ = ["load_factory", "placed", "Planned", "refuse_if_impossible", "warn_if_too_large"]
