"""Marks on modules that stage 3 gathers whole."""

from __future__ import annotations

import copy

import torch
from deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_modules, z3_leaf_module
from torch import nn

import deepspeed
from compat.engine.test_engine import config
from harness import ranks


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))


def test_a_copy_of_a_model_has_the_marks() -> None:
    model = _model()
    set_z3_leaf_modules(model, [nn.Linear])
    assert len(get_z3_leaf_modules(copy.deepcopy(model))) == 3


@ranks(1)
def test_modules_that_the_configuration_names_are_marked() -> None:
    for stage, marked in ((3, True), (2, False)):
        model = _model()
        settings = config(stage)
        settings["zero_optimization"]["leaf_module"] = {"classes": [], "names": ["0"]}
        engine = deepspeed.initialize(model=model, config=settings)[0]
        assert z3_leaf_module(model[0]) == marked
        assert not z3_leaf_module(model[1]) and not z3_leaf_module(model)
        engine(torch.ones(1, 4))
        engine.destroy()
