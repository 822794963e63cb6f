"""Divides a list of layers into consecutive parts. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence


def uniform(num_layers: int, num_parts: int) -> list[int]:
    """Returns `num_parts + 1` bounds of parts whose numbers of layers differ by at most one, larger ones first."""
    size, more = divmod(num_layers, num_parts)
    return [part * size + min(part, more) for part in range(num_parts + 1)]


def balanced(
    weights: Sequence[float],
    num_parts: int,
    *,
    sizes: Sequence[float] | None = None,
    limit: float = float("inf"),
) -> list[int]:
    """Returns the bounds whose largest sum of weights is the smallest possible.

    Of all such bounds, those with the smallest sum of squares, so that light parts are even, too. Every part has at
    least one layer as long as there are enough.

    Args:
        weights: cost of every layer.
        num_parts: number of parts.
        sizes: size of every layer, for example its memory.
        limit: no part may be larger.

    Raises:
        ValueError: no division keeps within `limit`.
    """
    count = len(weights)
    sums = _prefix(weights)
    volumes = _prefix(sizes if sizes is not None else [0.0] * count)
    least = 1 if count >= num_parts else 0
    worst = (float("inf"), float("inf"))
    # best[i]: (largest sum, sum of squares) of the first i layers in the parts so far; all bounds are tried.
    best = [(0.0, 0.0), *[worst] * count]
    came_from: list[list[int]] = []
    for _ in range(num_parts):
        following, origin = [worst] * (count + 1), [0] * (count + 1)
        for end in range(count + 1):
            for start in range(end - least + 1):
                weight = sums[end] - sums[start]
                if best[start] == worst or volumes[end] - volumes[start] > limit:
                    continue
                candidate = (max(best[start][0], weight), best[start][1] + weight * weight)
                if candidate < following[end]:
                    following[end], origin[end] = candidate, start
        best = following
        came_from.append(origin)
    if best[count] == worst:
        raise ValueError(
            f"{count} layers of {volumes[count]:g} bytes in all cannot be divided into {num_parts} consecutive parts "
            f"of at most {limit:g}"
        )
    bounds = [count]
    for origin in reversed(came_from):
        bounds.append(origin[bounds[-1]])
    return bounds[::-1]


def _prefix(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums
