"""Finds the fastest configuration: candidates, and a search that tries few of them. Without torch."""

from ds_engine.tune.candidates import Candidate, Space, candidates
from ds_engine.tune.search import Outcome, Prediction, Search, Tuned

__all__ = ["Candidate", "Outcome", "Prediction", "Search", "Space", "Tuned", "candidates"]
