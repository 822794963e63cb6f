"""Which layers' activations are moved: a pure function of bytes, times and rates.

[Note: the last layers stay]
Backward needs the activations of the last layer first, and there is no time to bring them back. Those of the first
layer have the rest of the forward to leave, and nearly all of the backward to return. So for every number of layers
that are moved, the best ones to move are the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one layer saves for backward, and how long it computes."""

    name: str
    num_bytes: int
    forward_s: float
    backward_s: float


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The layers whose activations are moved, and what that costs."""

    moved: tuple[str, ...]
    """Names, in the order of the forward."""
    kept_bytes: int
    """Bytes of the other layers: `ActivationOptions.budget_bytes`."""
    peak_bytes: int
    """The most bytes of activations that are on the device at one time, those that are leaving or returning included.
    """
    moved_bytes: int
    """Bytes that leave the device, and return, in one forward and backward."""
    waiting_s: float | None
    """Seconds that forward and backward wait for copies. None: not known."""

    def __str__(self) -> str:
        what = f"{len(self.moved)} layers are moved" if self.moved else "no layer is moved"
        if self.moved_bytes and not self.moved:
            what = "the tensors that are saved first are moved"
        if len(self.moved) > 1:
            what += f" ({self.moved[0]} to {self.moved[-1]})"
        waiting = "" if self.waiting_s is None else f", and {self.waiting_s:.3f} s are waited"
        return (
            f"{what}: {_size(self.moved_bytes)} leave and return, {_size(self.kept_bytes)} stay; at "
            f"most {_size(self.peak_bytes)} are on the device{waiting}"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


class BudgetTooSmall(ValueError):
    """Not even moving the activations of all layers fits into the budget."""


def choose_layers(
    layers: Sequence[LayerCost],
    *,
    budget_bytes: int,
    out_bytes_per_s: float,
    in_bytes_per_s: float,
    in_flight_bytes: int = 256 << 20,
) -> LayerChoice:
    """Returns the fewest layers to move so that activations fit into a budget of device memory.

    Args:
        layers: in the order of the forward.
        budget_bytes: device memory for activations.
        out_bytes_per_s, in_bytes_per_s: rates from and to the device: of the link to the host, or of the disk.
        in_flight_bytes: `ActivationOptions.in_flight_bytes`.

    Raises:
        BudgetTooSmall: it cannot be done.
        ValueError: a rate is not positive.
    """
    if not (out_bytes_per_s > 0 and in_bytes_per_s > 0):
        raise ValueError(
            f"rates must be positive, but are {out_bytes_per_s} and {in_bytes_per_s} bytes per second"
        )
    least = None
    for count in range(len(layers) + 1):
        forward = _forward(layers, count, out_bytes_per_s, in_flight_bytes)
        backward = _backward(layers, count, in_bytes_per_s)
        peak = max(forward[0], backward[0])
        if peak <= budget_bytes:
            return LayerChoice(
                moved=tuple(layer.name for layer in layers[:count]),
                kept_bytes=sum(layer.num_bytes for layer in layers[count:]),
                peak_bytes=peak,
                moved_bytes=sum(layer.num_bytes for layer in layers[:count]),
                waiting_s=forward[1] + backward[1],
            )
        least = peak if least is None else min(least, peak)
    assert least is not None
    raise BudgetTooSmall(
        f"activations may take {_size(budget_bytes)} of the device, and with layers moved they take at least "
        f"{_size(least)}: allow more, use smaller micro-batches, or recompute the layers (activation "
        "checkpointing)"
    )


_PARTS = 64
"""A forward without layers is divided into about so many parts."""


def choose_within(
    parts: Sequence[tuple[str, int]],
    *,
    limit_bytes: int,
    leaving_bytes: int,
    prefetch_bytes: int | None,
) -> LayerChoice:
    """Returns the fewest layers to move, whatever copies and layers take.

    Args:
        parts: in the order of the forward, (name, bytes) of each layer and of what is saved between layers, which has
            the name "". Without layers: of each saved tensor.
        limit_bytes, leaving_bytes, prefetch_bytes: see `ActivationOptions`.

    Raises:
        BudgetTooSmall: it cannot be done.
    """
    divided = any(name for name, _ in parts)
    # Without times, each copy ends when somebody waits for it, and returns while one part computes.
    costs = [
        LayerCost(name=name, num_bytes=size, forward_s=0.0, backward_s=0.0)
        for name, size in (parts if divided else _joined(parts))
    ]
    total = sum(cost.num_bytes for cost in costs)
    # `choose_layers` counts one part that returns; more of them may, if bytes are read ahead and not layers.
    more = max(0, (prefetch_bytes or 0) - min(cost.num_bytes for cost in costs))
    more = 0 if total <= limit_bytes else more
    choice = choose_layers(
        costs,
        budget_bytes=limit_bytes - more,
        out_bytes_per_s=1.0,
        in_bytes_per_s=1.0,
        in_flight_bytes=leaving_bytes,
    )
    return replace(
        choice,
        moved=tuple(name for name in choice.moved if name),
        peak_bytes=choice.peak_bytes + more,
        waiting_s=None,
    )


def _joined(parts: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Joins neighbours to about `_PARTS` parts."""
    least = sum(size for _, size in parts) / _PARTS
    joined: list[tuple[str, int]] = []
    for name, size in parts:
        if joined and joined[-1][1] + size <= least:
            joined[-1] = (name, joined[-1][1] + size)
        else:
            joined.append((name, size))
    return joined


def _forward(layers: Sequence[LayerCost], count: int, rate: float, in_flight_bytes: int) -> tuple[int, float]:
    """Returns the peak of bytes on the device, and the seconds that are waited, in a forward in which the first `count`
    layers are moved: each leaves after it is computed, one after the other, and computation waits if more than
    `in_flight_bytes` are leaving.
    """
    now = free_at = waited = 0.0
    kept = peak = 0
    leaving: list[tuple[float, int]] = []  # (end of the copy, bytes)
    for number, layer in enumerate(layers):
        now += layer.forward_s
        leaving = [(end, size) for end, size in leaving if end > now]
        peak = max(peak, kept + sum(size for _, size in leaving) + layer.num_bytes)
        if number >= count:
            kept += layer.num_bytes
            continue
        free_at = max(free_at, now) + layer.num_bytes / rate
        leaving.append((free_at, layer.num_bytes))
        while leaving and sum(size for _, size in leaving) > in_flight_bytes:
            end, _ = leaving.pop(0)
            waited += max(0.0, end - now)
            now = max(now, end)
    return peak, waited


def _backward(layers: Sequence[LayerCost], count: int, rate: float) -> tuple[int, float]:
    """Returns the same for the backward: while a layer computes, the one before it returns."""
    kept = sum(layer.num_bytes for layer in layers[count:])
    now = waited = 0.0
    peak = 0
    arrives = [0.0] * len(layers)
    link = 0.0
    for number in reversed(range(len(layers))):
        layer = layers[number]
        if number < count:
            if number == len(layers) - 1:  # nobody has asked for it before
                link = max(link, now) + layer.num_bytes / rate
                arrives[number] = link
            waited += max(0.0, arrives[number] - now)
            now = max(now, arrives[number])
        on_device = kept + (layer.num_bytes if number < count else 0)
        if 0 < number <= count:
            before = layers[number - 1]
            link = max(link, now) + before.num_bytes / rate
            arrives[number - 1] = link
            on_device += before.num_bytes
        peak = max(peak, on_device)
        now += layer.backward_s
        if number >= count:
            kept -= layer.num_bytes
    return peak, waited
