"""MuAdam, MuAdamW and MuSGD: rates that follow the width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_engine.build import optimizer
from ds_engine.config import ConfigError
from ds_engine.job import OptimizerChoice


class Shape:
    """What mup.set_base_shapes attaches to a parameter, as far as it is used."""

    def __init__(self, growing: int, width: float, fans: float = 1.0) -> None:
        self.growing, self.width, self.fans = growing, width, fans

    def ninf(self) -> int:
        return self.growing

    def width_mult(self) -> float:
        return self.width

    def fanin_fanout_mult_ratio(self) -> float:
        return self.fans


def model() -> nn.Sequential:
    """An input layer that grows in one dimension, a hidden one in both (4 times), an output one, a plain bias."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    shapes = {"0.weight": (1, 1), "1.weight": (2, 4, 2), "2.weight": (1, 4), "2.bias": (0, 1)}
    for name, parameter in net.named_parameters():
        parameter.infshape = Shape(*shapes.get(name, (1, 4)))  # type: ignore[attr-defined]
    return net


def built(name: str, net: nn.Module, **params: Any) -> dict[str, dict[str, Any]]:
    """Name of a parameter -> its group."""
    names = {id(p): n for n, p in net.named_parameters()}
    made = optimizer.build(OptimizerChoice(name=name, params=params), net.parameters(), names)
    return {names[id(p)]: group for group in made.param_groups for p in group["params"]}


@pytest.mark.parametrize(("name", "decoupled"), [("MuAdam", False), ("muadamw", True)])
def test_adam_divides_the_rate_of_what_grows_in_two_dimensions(name: str, decoupled: bool) -> None:
    groups = built(name, model(), lr=0.1, weight_decay=0.5)
    assert len(groups) == 6
    for parameter, group in groups.items():
        factor = 4 if parameter == "1.weight" else 1
        assert group["lr"] == pytest.approx(0.1 / factor)
        assert group["weight_decay"] == pytest.approx(0.5 * factor)
        assert group["decoupled_weight_decay"] is decoupled


def test_sgd_multiplies_the_rate_of_what_grows_in_one_dimension() -> None:
    groups = built("MuSGD", model(), lr=0.1, weight_decay=0.5)
    factors = {"0.weight": 1, "1.weight": 0.5, "2.weight": 4, "2.bias": 1, "0.bias": 4, "1.bias": 4}
    for parameter, factor in factors.items():
        assert groups[parameter]["lr"] == pytest.approx(0.1 * factor)
        assert groups[parameter]["weight_decay"] == pytest.approx(0.5 / factor)


def test_the_decay_may_stay_and_groups_keep_what_is_theirs() -> None:
    net = model()
    items = [{"params": list(net.parameters()), "lr": 0.2, "name": "mine"}]
    made = optimizer.build(
        OptimizerChoice(name="MuAdamW", params={"lr": 0.1, "weight_decay": 0.5, "decoupled_wd": True}),
        items,
        {},
    )
    assert {group["lr"] for group in made.param_groups} == {0.2, 0.05}
    assert all(group["weight_decay"] == 0.5 and group["name"] == "mine" for group in made.param_groups)


def test_it_trains_at_the_base_width_as_the_plain_optimizer() -> None:
    outcome = []
    for name in ("MuAdamW", "AdamW"):
        torch.manual_seed(0)
        net = nn.Linear(4, 4)
        for parameter in net.parameters():
            parameter.infshape = Shape(2, 1.0)  # type: ignore[attr-defined]
        made = optimizer.build(OptimizerChoice(name=name, params={"lr": 0.1}), net.parameters(), {})
        for _ in range(3):
            net(torch.ones(2, 4)).square().mean().backward()
            made.step()
        outcome.append(net.weight.detach())
    assert torch.equal(*outcome)


def test_what_has_no_shape_is_named() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"parameter weight has no infshape: call mup\.set_base_shapes"):
        built("MuAdam", net)
    net.weight.infshape = Shape(3, 2.0)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="3 dimensions of the parameter weight grow"):
        built("MuSGD", net)
