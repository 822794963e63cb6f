"""Arguments of optimizers and schedules that are meant as numbers have to be numbers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from ds_engine import schedules
from ds_engine.config.load.arguments import NUMBERS, mistakes


def said(section: str, **params: Any) -> list[str]:
    return [text for _, text in mistakes({section: {"type": "x", "params": params}})]


@pytest.mark.parametrize("text", ["3e-4", "1", " 0.5 ", "-1e3", ".5", "1."])
def test_a_number_in_quotes_is_refused_under_any_name(text: str) -> None:
    for name in ("lr", "my_own_argument"):
        assert said("optimizer", **{name: text}) == [
            f'optimizer.params.{name} is "{text}": it must be a number: remove the quotes'
        ]


@pytest.mark.parametrize("value", ["fast", True, {}, float("nan"), float("-inf"), [0.9, "x"], 10**400])
def test_what_is_no_number_is_refused_where_one_is_meant(value: Any) -> None:
    (text,) = said("optimizer", lr=value)
    assert text.startswith("optimizer.params.lr is ")


@pytest.mark.parametrize("value", [0, 1, 1e-3, [0.9, 0.999], (1, 2), None, "auto"])
def test_numbers_lists_of_them_and_what_is_filled_in_are_fine(value: Any) -> None:
    assert said("optimizer", lr=value) == []


def test_texts_and_flags_that_are_meant_are_fine() -> None:
    assert said("scheduler", warmup_type="linear") == said("optimizer", nesterov=True, ns_method="gram") == []


def test_sections_without_arguments_are_passed_over() -> None:
    assert list(mistakes({"optimizer": None, "scheduler": {"type": "WarmupLR", "params": 3}})) == []


def test_every_argument_with_a_number_as_default_is_known() -> None:
    """Of our schedules and of the optimizers that a configuration names most."""
    made = [*schedules.OWN.values(), torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad]
    for make in made:
        for name, parameter in inspect.signature(make).parameters.items():
            if isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool):
                assert name in NUMBERS, f"{make}: {name}"
