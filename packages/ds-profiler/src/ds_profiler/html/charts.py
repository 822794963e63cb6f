"""Charts as SVG: lines over an axis with round ticks. The values under the pointer are shown by charts.js."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float]
Unit = Literal["", "bytes", "seconds"]
"""What the values of a chart are. Ticks of bytes are round in KiB, MiB, ..., and those of seconds in us, ms or s."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 440, 240, 58, 12, 24, 40
COLOURS = ("#2b6cb0", "#d9822b", "#2f8f4e", "#b83280", "#8e62b8", "#7a8ba3", "#b7791f", "#c53030")
SCALES: Mapping[str, tuple[tuple[float, str], ...]] = {
    "": ((1.0, ""),),
    "bytes": ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "bytes")),
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart. Points whose value is not finite are left out."""

    name: str
    """Shown in the legend; empty: the line has no entry there."""
    points: Sequence[Point]
    dotted: bool = False
    """Marks every point, for lines with few of them."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over a common axis."""

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str = ""
    unit: Unit = ""
    from_zero: bool = False
    """Whether the vertical axis begins at 0."""
    log_x: bool = False
    """Whether equal distances along the horizontal axis are equal factors; ticks are then the given positions."""
    most_points: int = 600
    """Of a line with more points than this, the smallest and the largest value of each part are drawn."""

    def svg(self) -> str:
        """The chart as a `figure` element; a remark in the place of the drawing if there is no finite value."""
        finite = [_finite(line.points) for line in self.lines]
        drawn = [thinned(points, self.most_points) for points in finite]
        missing = sum(len(line.points) - len(points) for line, points in zip(self.lines, finite, strict=True))
        remark = f"<p>{missing} value{'s' * (missing != 1)} not finite</p>" if missing else ""
        head = f"<figcaption>{html.escape(self.title)}</figcaption>"
        if not any(drawn):
            return f"<figure>{head}{remark or '<p>no values</p>'}</figure>"
        frame = _Frame.around(self, [point for points in drawn for point in points])
        parts = [*frame.axes(), f'<line class="mark" x1="0" x2="0" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>']
        for number, (line, points) in enumerate(zip(self.lines, drawn, strict=True)):
            parts += frame.drawn(points, COLOURS[number % len(COLOURS)], line.dotted or len(points) == 1)
        data = json.dumps(frame.data(self, drawn), separators=(",", ":")).replace("<", "\\u003c")
        return (
            f'<figure class="chart">{head}{self._legend()}'
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(self.title)}">'
            f"{''.join(parts)}</svg>"
            f'<script type="application/json">{data}</script>{remark}</figure>'
        )

    def _legend(self) -> str:
        entries = [
            f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{html.escape(line.name)}</span>'
            for i, line in enumerate(self.lines)
            if line.name
        ]
        return f'<div class="legend">{"".join(entries)}</div>' if entries else ""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The axes of a chart, and where values are on them."""

    chart: Chart
    x: tuple[float, float]
    y: tuple[float, float]
    scale: float
    """Value of one unit of the vertical axis."""
    unit: str
    x_ticks: tuple[float, ...]
    y_ticks: tuple[float, ...]

    @classmethod
    def around(cls, chart: Chart, points: Sequence[Point]) -> _Frame:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        low, high = min(ys), max(ys)
        if chart.from_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        if low == high:
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
            low = max(low, 0.0) if chart.from_zero else low
        scale, unit = next(
            (s for s in SCALES[chart.unit] if max(abs(low), abs(high)) >= s[0]), SCALES[chart.unit][-1]
        )
        y_ticks = tuple(tick * scale for tick in ticks(low / scale, high / scale, 5, outside=True))
        x_ticks = tuple(sorted(set(xs))) if chart.log_x else ticks(min(xs), max(xs), 6)
        return cls(
            chart=chart,
            x=(min(xs), max(xs)),
            y=(y_ticks[0], y_ticks[-1]),
            scale=scale,
            unit=unit,
            x_ticks=x_ticks,
            y_ticks=y_ticks,
        )

    def at(self, point: Point) -> Point:
        """The place of a point in the drawing."""
        along = math.log2 if self.chart.log_x else float
        low, high = along(self.x[0]), along(self.x[1])
        across = (along(point[0]) - low) / ((high - low) or 1.0)
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _TOP + (1 - up) * (_HEIGHT - _TOP - _BOTTOM)

    def axes(self) -> list[str]:
        parts = []
        for tick in self.y_ticks:
            _, y = self.at((self.x[0], tick))
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(_text(_LEFT - 6, y + 4, number_text(tick / self.scale), "end"))
        for tick in self.x_ticks:
            x, _ = self.at((tick, self.y[0]))
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_HEIGHT - _BOTTOM}" y2="{_TOP}"/>'
            )
            anchor = "end" if x > _WIDTH - _RIGHT - 20 else "middle"
            parts.append(_text(x, _HEIGHT - _BOTTOM + 16, number_text(tick), anchor))
        label = " ".join(part for part in (self.chart.y_label, f"({self.unit})" if self.unit else "") if part)
        parts.append(_text(4, 12, label, "start"))
        parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, self.chart.x_label, "middle"))
        return parts

    def drawn(self, points: Sequence[Point], colour: str, dotted: bool) -> list[str]:
        if not points:
            return []
        places = [self.at(point) for point in points]
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts = [f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="1.6"/>']
        if dotted:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in places]
        return parts

    def data(self, chart: Chart, drawn: Sequence[Sequence[Point]]) -> dict[str, object]:
        """What charts.js needs: where the horizontal axis lies, and every point with its value as text."""
        unit = f" {self.unit}" if self.unit else ""
        return {
            "axis": chart.x_label,
            "log": chart.log_x,
            "low": self.x[0],
            "high": self.x[1],
            "left": _LEFT,
            "width": _WIDTH - _LEFT - _RIGHT,
            "lines": [
                {
                    "name": line.name,
                    "points": [[x, round(y, 9), f"{y / self.scale:.5g}{unit}"] for x, y in points],
                }
                for line, points in zip(chart.lines, drawn, strict=True)
            ],
        }


def ticks(low: float, high: float, about: int, *, outside: bool = False) -> tuple[float, ...]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`.

    Args:
        about: how many are wanted; there are at most about twice as many.
        outside: begin at or below `low` and end at or above `high`, so that the ticks span all values.
    """
    if low == high and not outside:
        return (low,)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / about * 0.999)
    first, last = low / step, high / step
    # A value that is a tick except for rounding must not add another one.
    begin = math.floor(first + 1e-9) if outside else math.ceil(first - 1e-9)
    end = math.ceil(last - 1e-9) if outside else math.floor(last + 1e-9)
    digits = max(0, 12 - math.floor(math.log10(max(abs(low), abs(high), step))))
    return tuple(round(i * step, digits) for i in range(begin, max(end, begin) + 1))


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """A line with at most about `most` points: of each part the smallest and the largest value, so peaks stay."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def number_text(value: float) -> str:
    """A tick as text: 20,000 or 0.05 or 5e-5."""
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:,.5f}".rstrip("0").rstrip(".")


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
