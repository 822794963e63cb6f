"""How much memory a job takes, told before it starts: `plan` for a model that nobody holds, and a check at the start of
each run. Both ask `ds_zero.plan` about the same `Job`.
"""

from ds_engine.build.memory.check import warn_if_too_large
from ds_engine.build.memory.plan import load_factory, plan

__all__ = ["load_factory", "plan", "warn_if_too_large"]
