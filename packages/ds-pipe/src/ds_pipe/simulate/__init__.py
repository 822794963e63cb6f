"""Simulation of schedules: absence of deadlock, bubbles, memory and messages, before anything runs."""

from ds_pipe.simulate.choose import Candidate, Choice, choose
from ds_pipe.simulate.costs import Costs, StageCosts
from ds_pipe.simulate.formulas import bubble_of_one_step
from ds_pipe.simulate.results import Simulation, Span
from ds_pipe.simulate.simulator import simulate

__all__ = [
    "Candidate",
    "Choice",
    "Costs",
    "Simulation",
    "Span",
    "StageCosts",
    "bubble_of_one_step",
    "choose",
    "simulate",
]
