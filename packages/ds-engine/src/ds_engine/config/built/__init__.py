"""What this version does with every key: works, has no effect, or is refused; one table.

A feature that lands flips its row from `later` to `works`; nothing else decides what is accepted.
"""

from ds_engine.config.built.row import Row, State
from ds_engine.config.built.table import BUILT, effectless, refusals, row_of

__all__ = ["BUILT", "Row", "State", "effectless", "refusals", "row_of"]
