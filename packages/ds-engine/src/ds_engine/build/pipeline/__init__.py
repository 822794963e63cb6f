"""Pipeline models: their place in a job, their state, and a `RunsPipeline` made of ds_pipe and ds_zero."""

from ds_engine.build.pipeline.place import Placed, choice_of, place, refuse
from ds_engine.build.pipeline.stages import StagesOfJob
from ds_engine.build.pipeline.state import with_state
from ds_engine.build.pipeline.tensor import cut_stages

__all__ = ["Placed", "StagesOfJob", "choice_of", "cut_stages", "place", "refuse", "with_state"]
