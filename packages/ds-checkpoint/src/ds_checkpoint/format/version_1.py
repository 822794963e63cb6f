"""Manifests of version 1, in which mesh coordinates were the end of a name: "w#0of2" for an expert, "w#part0of2" for a
part of a model that was cut among ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ds_checkpoint.format.model_part import MODEL_AXES
from ds_checkpoint.interfaces import Coordinates

_ENDS = re.compile(r"(?:#(?P<expert>\d+)of(?P<experts>\d+))?(?:#part(?P<part>\d+)of(?P<parts>\d+))?\Z")
_NUM_PARTS = "model_parallel_size"


def separated(name: str) -> tuple[str, Coordinates]:
    """A name of version 1 -> the name in the model, and the coordinates."""
    ends = _ENDS.search(name)
    assert ends is not None
    coordinates = {}
    if ends["expert"] is not None:
        coordinates["expert"] = (int(ends["expert"]), int(ends["experts"]))
    if ends["part"] is not None:
        coordinates["tensor"] = (int(ends["part"]), int(ends["parts"]))
    return name[: ends.start()], coordinates


def upgraded(body: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of version 1 as that of version 2."""
    tensors: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for stored, states in body["tensors"].items():
        fqn, coordinates = separated(stored)
        for state, entry in states.items():
            tensors.setdefault(fqn, {}).setdefault(state, []).append(entry | {"coordinates": coordinates})
    values = dict(body["values"])
    num_parts = int(values.pop(_NUM_PARTS, 1))
    values[MODEL_AXES] = {"tensor": num_parts} if num_parts > 1 else {}
    return {**body, "tensors": tensors, "values": values}
