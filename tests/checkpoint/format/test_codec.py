"""What users put into a checkpoint comes back equal, or is refused by name."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ds_checkpoint.format import codec

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=5) | st.sampled_from(["$tensor", "$items", "$"]) | st.integers() | st.booleans()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


def round_trip(value: Any) -> Any:
    tensors: dict[str, Tensor] = {}
    text = json.dumps(codec.encode(value, "client_state", tensors, "client"), allow_nan=False)
    return codec.decode(json.loads(text), tensors.__getitem__)


@given(values)
def test_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    assert repr(round_trip(value)) == repr(
        value
    )  # repr tells tuples from lists, 1 from 1.0 and True, nan from nothing


def test_tensors_and_counters() -> None:
    value = {"t": torch.arange(3), "deep": [(torch.ones(2, 2),)], "milestones": Counter({3: 2, 5: 1})}
    back = round_trip(value)
    assert torch.equal(back["t"], value["t"]) and torch.equal(back["deep"][0][0], torch.ones(2, 2))
    assert back["milestones"] == value["milestones"] and isinstance(back["milestones"], Counter)
    assert math.isinf(round_trip(float("-inf")))


class Thing:
    pass


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"a": [{"b": Thing()}]}, r"client_state\['a'\]\[0\]\['b'\] is a .*Thing: a checkpoint holds None"),
        ({"f": len}, r"client_state\['f'\] is a builtins.builtin_function_or_method"),
        ({"c": 1j}, r"client_state\['c'\] is a builtins.complex"),
        ({(1, 2): 3}, r"client_state has a key of type tuple, \(1, 2\)"),
    ],
)
def test_what_cannot_be_kept_is_named(value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        codec.encode(value, "client_state", {}, "client")


def test_what_training_scripts_keep_besides_plain_values() -> None:
    value = {
        "args": argparse.Namespace(lr=0.1, names=("a", "b")),
        "seen": {3, 1},
        "raw": b"\x00\xff",
        "where": Path("a") / "b",
        "dtype": torch.bfloat16,
        "loss": np.float32(0.5),
    }
    back = round_trip(value)
    assert back == value and type(back["args"]) is argparse.Namespace and type(back["loss"]) is float
    grid = round_trip({"grid": np.arange(6).reshape(2, 3)})["grid"]
    assert isinstance(grid, np.ndarray) and (grid == np.arange(6).reshape(2, 3)).all()
