"""Named axes: where a rank stands, and what belongs together."""

from __future__ import annotations

import itertools

import pytest

from ds_engine.build.topology import arranged
from ds_engine.config import ConfigError, load
from ds_engine.job import ALONE, AXES, Axis, Topology
from ds_engine.job.topology import ALIASES


def test_every_axis_has_a_name_and_an_alias() -> None:
    assert sorted(ALIASES.values()) == sorted(AXES)
    made = Topology(pipe=Axis(1, 2), data=Axis(3, 4), tensor=Axis(0, 2))
    assert made.axis("pp") == made.axis("pipe") == Axis(1, 2) and made.axis("dp_replicate") == ALONE
    assert made.sizes() == {"pipe": 2, "data": 4, "tensor": 2} and str(made) == "pipe 2 x data 4 x tensor 2"
    assert made.world_size == 16 and str(Topology()) == "one rank"
    with pytest.raises(ValueError, match="there is no axis 'model'"):
        made.axis("model")


def test_experts_are_folded_inside_of_data() -> None:
    assert Topology(data=Axis(5, 8), expert=Axis(1, 4)).world_size == 8
    with pytest.raises(ValueError, match="3 expert ranks do not divide the 8 data-parallel ranks"):
        Topology(data=Axis(5, 8), expert=Axis(1, 3))


def test_ranks_of_samples_and_of_model_parts_are_counted_once_each() -> None:
    sizes = {"pipe": 2, "replicate": 2, "data": 3, "tensor": 2}
    seen = set()
    for index in itertools.product(*(range(size) for size in sizes.values())):
        axes = {name: Axis(i, size) for (name, size), i in zip(sizes.items(), index, strict=True)}
        made = Topology(**axes)
        assert (made.samples.size, made.model.size) == (6, 4)
        seen.add((made.samples.index, made.model.index))
    assert seen == set(itertools.product(range(6), range(4)))


def test_a_coordinate_lies_on_its_axis() -> None:
    with pytest.raises(ValueError, match="coordinate 4 is outside of an axis with 4 ranks"):
        Axis(4, 4)


def test_groups_that_hold_replicas_come_from_the_configuration() -> None:
    settings = load({"train_batch_size": 8, "zero_optimization": {"stage": 3, "mics_shard_size": 2}})
    made = arranged(settings, 3, 4)
    assert (made.replicate, made.data, made.samples) == (Axis(1, 2), Axis(1, 2), Axis(3, 4))
    with pytest.raises(ConfigError, match="mics_shard_size 2 does not divide 5 data-parallel ranks"):
        arranged(settings, 0, 5)
