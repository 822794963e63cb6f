"""Which layers are moved: the fewest that fit, found again by trying all sets, and the prediction by measuring."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from ds_offload import ActivationOffload, ActivationOptions
from ds_offload.activations.choice import BudgetTooSmall, LayerCost, choose_layers

GIB = 1 << 30


def layer(number: int, num_bytes: int, seconds: float = 0.01) -> LayerCost:
    return LayerCost(name=f"layers.{number}", num_bytes=num_bytes, forward_s=seconds, backward_s=2 * seconds)


def chosen(layers: list[LayerCost], budget: int, rate: float = 20e9, in_flight: int = 0) -> tuple[str, ...]:
    return choose_layers(
        layers, budget_bytes=budget, out_bytes_per_s=rate, in_bytes_per_s=rate, in_flight_bytes=in_flight
    ).moved


def test_nothing_is_moved_if_all_fits() -> None:
    layers = [layer(i, GIB) for i in range(8)]
    choice = choose_layers(layers, budget_bytes=8 * GIB, out_bytes_per_s=1e9, in_bytes_per_s=1e9)
    assert choice.moved == () and choice.waiting_s == 0 and choice.peak_bytes == choice.kept_bytes == 8 * GIB
    assert str(choice).startswith("no layer is moved: 0.0 MiB leave and return, 8.00 GiB stay")


def test_the_first_layers_are_moved() -> None:
    layers = [layer(i, GIB) for i in range(8)]
    assert chosen(layers, 6 * GIB) == ("layers.0", "layers.1")
    assert chosen(layers, 6 * GIB - 1) == ("layers.0", "layers.1", "layers.2")
    # In backward, one layer computes and another returns beside it.
    assert chosen(layers, 2 * GIB) == tuple(f"layers.{i}" for i in range(6))
    with pytest.raises(
        BudgetTooSmall,
        match=r"may take 1\.00 GiB of the device, and with layers moved they take at least 2\.00 GiB",
    ):
        chosen(layers, GIB)


@pytest.mark.parametrize("seed", range(20))
def test_no_set_with_fewer_bytes_fits(seed: int) -> None:
    """Backward holds what stays and is not used yet, the layer that computes, and the one that returns."""
    rng = random.Random(seed)
    layers = [layer(i, rng.randint(1, 8) << 20) for i in range(7)]
    budget = rng.randint(16, 30) << 20  # at least two layers

    def peak(moved: set[int]) -> int:
        result = 0
        for at in range(len(layers)):
            stays = sum(layers[i].num_bytes for i in range(at + 1) if i not in moved or i == at)
            result = max(result, stays + (layers[at - 1].num_bytes if at and at - 1 in moved else 0))
        return result

    sets = [set(c) for n in range(8) for c in itertools.combinations(range(7), n)]
    fitting = [s for s in sets if peak(s) <= budget]
    prefixes = [s for s in fitting if s == set(range(len(s)))]
    best = chosen(layers, budget)
    assert len(best) == min(len(s) for s in prefixes)

    def num_bytes(moved: set[int]) -> int:
        return sum(layers[i].num_bytes for i in moved)

    largest = max(layer.num_bytes for layer in layers)
    assert num_bytes(set(range(len(best)))) <= min(num_bytes(s) for s in fitting) + largest


def test_waiting_is_what_the_link_takes_longer_than_the_computation() -> None:
    layers = [layer(i, 1 << 20, 1.0) for i in range(4)]
    fast = choose_layers(
        layers, budget_bytes=2 << 20, out_bytes_per_s=1 << 21, in_bytes_per_s=1 << 21, in_flight_bytes=1 << 20
    )
    assert fast.moved == ("layers.0", "layers.1") and fast.waiting_s == 0
    slow = choose_layers(
        layers, budget_bytes=2 << 20, out_bytes_per_s=1 << 20, in_bytes_per_s=1 << 18, in_flight_bytes=1 << 20
    )
    # Backward: each of two layers takes 4 s to return, 2 s of which the layer behind it computes.
    assert slow.waiting_s == pytest.approx(2 * (4 - 2))
    with pytest.raises(ValueError, match="rates must be positive"):
        choose_layers(layers, budget_bytes=1, out_bytes_per_s=0, in_bytes_per_s=1)


def test_the_kept_bytes_are_the_budget_with_which_just_these_layers_are_moved() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))
    x = torch.randn(4096, 64, requires_grad=True)
    size = 1 << 20
    choice = choose_layers(
        [layer(i, size) for i in range(6)],
        budget_bytes=4 * size,
        out_bytes_per_s=1e9,
        in_bytes_per_s=1e9,
        in_flight_bytes=0,
    )
    assert len(choice.moved) == 2
    offload = ActivationOffload(ActivationOptions(budget_bytes=choice.kept_bytes))
    for _ in range(2):
        with offload:
            y = model(x)
        y.sum().backward()
    assert offload.statistics.kept_bytes == choice.kept_bytes
    assert offload.statistics.moved_bytes == 6 * size + 2 * size
