"""Choice of samples by difficulty or by number of tokens, and the measures that both need."""

from ds_engine.sampling.analyze import Analyzer
from ds_engine.sampling.curriculum import Criterion, CurriculumOrder
from ds_engine.sampling.index import MetricIndex, open_index, open_values, write_index
from ds_engine.sampling.tokens import Packing, TokenBatches, pack, rate_factor, scaled_rates

__all__ = [
    "Analyzer",
    "Criterion",
    "CurriculumOrder",
    "MetricIndex",
    "Packing",
    "TokenBatches",
    "open_index",
    "open_values",
    "pack",
    "rate_factor",
    "scaled_rates",
    "write_index",
]
