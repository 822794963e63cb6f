"""The status of every key in this version: it works, has no effect, or is refused.

A new feature changes its row from `later` to `works`. Only this table decides what is accepted.
"""

from ds_engine.config.built.row import Row, State
from ds_engine.config.built.table import BUILT, effectless, refusals, row_of

__all__ = ["BUILT", "Row", "State", "effectless", "refusals", "row_of"]
