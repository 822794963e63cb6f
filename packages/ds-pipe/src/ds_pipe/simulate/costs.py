"""What the actions of a schedule cost: seconds and bytes of every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ds_pipe.actions import Op


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Costs of one stage for one micro-batch. The defaults make a forward and both parts of a backward equally long."""

    forward_s: float = 1.0
    """Seconds of a forward."""
    backward_input_s: float = 1.0
    """Seconds of the part of backward that computes gradients of the input."""
    backward_weight_s: float = 1.0
    """Seconds of the part of backward that computes gradients of the parameters."""
    activation_bytes: int = 0
    """Bytes that a forward keeps for backward."""
    weight_activation_bytes: int | None = None
    """Bytes of these that are still kept between the two parts of backward. None: all of them."""
    output_bytes: int = 0
    """Bytes that are sent to the next stage; their gradients have as many."""
    resident_bytes: int = 0
    """Bytes of parameters, gradients and optimizer states."""
    unshard_s: float = 0.0
    """Seconds to gather the parameters of a sharded stage."""
    reduce_s: float = 0.0
    """Seconds to reduce the gradients over data-parallel ranks."""

    def seconds(self, op: Op) -> float:
        """Returns the seconds of a forward or backward."""
        return {
            Op.FORWARD: self.forward_s,
            Op.BACKWARD: self.backward_input_s + self.backward_weight_s,
            Op.BACKWARD_INPUT: self.backward_input_s,
            Op.BACKWARD_WEIGHT: self.backward_weight_s,
        }[op]

    @property
    def between_bytes(self) -> int:
        """Bytes that are kept between the two parts of backward."""
        kept = self.weight_activation_bytes
        return self.activation_bytes if kept is None else kept


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Costs of all stages, and of the messages between ranks."""

    stages: tuple[StageCosts, ...]
    """One entry for each stage."""
    latency_s: float = 0.0
    """Seconds from the start of a message until its first byte arrives."""
    bytes_per_s: float = field(default=float("inf"))
    """Bytes per second of the link between two ranks, in each direction."""
    action_s: float = 0.0
    """Seconds that every action takes in addition."""

    @classmethod
    def uniform(cls, num_stages: int, stage: StageCosts | None = None) -> Costs:
        """Returns costs of equal stages without costs of messages."""
        return cls(stages=(stage or StageCosts(),) * num_stages)

    @classmethod
    def parse(cls, text: str) -> Costs:
        """Reads costs from JSON: an object with the fields of this class, `stages` being a list of objects with the
        fields of `StageCosts`.

        Raises:
            ValueError: it is no such object; the message names the field.
        """
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"costs are not JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("stages"), list) or not value["stages"]:
            raise ValueError('costs have to be an object with a list "stages", one object for each stage')
        stages = tuple(
            StageCosts(**_numbers(stage, StageCosts, f"stages[{i}]"))
            for i, stage in enumerate(value["stages"])
        )
        others = {k: v for k, v in value.items() if k != "stages"}
        return cls(stages=stages, **_numbers(others, cls, "costs"))

    def merged(self, num_stages: int) -> Costs:
        """Returns the costs when consecutive stages are joined to `num_stages`.

        Raises:
            ValueError: `num_stages` does not divide the number of stages.
        """
        if num_stages < 1 or len(self.stages) % num_stages:
            raise ValueError(f"{len(self.stages)} stages cannot be joined to {num_stages} of equal size")
        width = len(self.stages) // num_stages
        groups = [self.stages[i : i + width] for i in range(0, len(self.stages), width)]
        return Costs(
            stages=tuple(map(_joined, groups)),
            latency_s=self.latency_s,
            bytes_per_s=self.bytes_per_s,
            action_s=self.action_s,
        )


def _numbers(value: object, owner: type, where: str) -> dict[str, Any]:
    names = [f.name for f in fields(owner) if f.name != "stages"]
    if not isinstance(value, dict):
        raise ValueError(f"{where} has to be an object with some of the fields {', '.join(names)}")
    for key, number in value.items():
        if key not in names:
            raise ValueError(f"{where}: no field {key!r}; fields are {', '.join(names)}")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 0:
            raise ValueError(f"{where}.{key} has to be a number, at least 0; got {number!r}")
    return value


def _joined(stages: Sequence[StageCosts]) -> StageCosts:
    return StageCosts(
        forward_s=sum(s.forward_s for s in stages),
        backward_input_s=sum(s.backward_input_s for s in stages),
        backward_weight_s=sum(s.backward_weight_s for s in stages),
        activation_bytes=sum(s.activation_bytes for s in stages),
        weight_activation_bytes=sum(s.between_bytes for s in stages),
        output_bytes=stages[-1].output_bytes,
        resident_bytes=sum(s.resident_bytes for s in stages),
        unshard_s=sum(s.unshard_s for s in stages),
        reduce_s=sum(s.reduce_s for s in stages),
    )
