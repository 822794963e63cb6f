"""Charts: round ticks that span the values, units, and nothing that is not finite."""

from __future__ import annotations

import json
import math
import re

import pytest

from ds_profiler.html import Chart, Line
from ds_profiler.html.charts import number_text, thinned, ticks


def shown(chart):
    """(texts of the axes, data of the script) of a chart."""
    svg = chart.svg()
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    return texts, json.loads(re.search(r"application/json\">(.*?)</script>", svg).group(1))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, (0, 2, 4, 6, 8, 10)),
        (1.31, 4.9, (1, 2, 3, 4, 5)),
        (0, 0.0015, (0, 0.0005, 0.001, 0.0015)),
        (-3, 7, (-4, -2, 0, 2, 4, 6, 8)),
        (0.1, 0.3, (0.1, 0.15, 0.2, 0.25, 0.3)),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, expected):
    assert ticks(low, high, 5, outside=True) == pytest.approx(expected)


def test_ticks_inside_stay_within_the_values():
    assert ticks(3, 160, 6) == (50, 100, 150)
    assert ticks(7, 7, 6) == (7,)


def test_memory_starts_at_zero_and_is_round_in_its_unit():
    points = [(1, 700 * 2**20), (2, 900 * 2**20)]
    chart = Chart(
        title="m", lines=[Line(name="", points=points)], x_label="step", unit="bytes", from_zero=True
    )
    texts, data = shown(chart)
    assert texts[:5] == ["0", "200", "400", "600", "800"]
    assert "(MiB)" in texts and "step" in texts
    assert data["lines"][0]["points"][1][2] == "900 MiB"


def test_values_that_are_not_finite_are_left_out_and_counted():
    line = Line(name="a", points=[(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)])
    svg = Chart(title="t < u", lines=[line], x_label="x").svg()
    assert "2 values not finite" in svg and "nan" not in svg and "t &lt; u" in svg
    assert "no values" in Chart(title="t", lines=[Line(name="", points=[])], x_label="x").svg()


def test_thinned_lines_keep_peaks_and_ends():
    points = [(i, i % 100) for i in range(10_000)]
    points[4321] = (4321, 5000)
    few = thinned(points, 600)
    assert len(few) <= 602 and (4321, 5000) in few and few[-1] == points[-1]
    assert [x for x, _ in few] == sorted(x for x, _ in few)


def test_a_logarithmic_axis_marks_the_given_positions():
    lines = [Line(name="s", points=[(1, 5.0), (8, 3.0), (64, 1.0)])]
    texts, _ = shown(Chart(title="t", lines=lines, x_label="ranks", log_x=True))
    assert [t for t in texts if t in ("1", "8", "64")][-3:] == ["1", "8", "64"]
    xs = re.search(
        r'polyline points="([^"]*)"', Chart(title="t", lines=lines, x_label="r", log_x=True).svg()
    ).group(1)
    a, b, c = (float(pair.split(",")[0]) for pair in xs.split())
    assert b - a == pytest.approx(c - b, abs=0.2)


def test_numbers_are_short():
    assert [number_text(v) for v in (0, 20000, 0.05, 5e-5, 1.5e9)] == ["0", "20,000", "0.05", "5e-5", "1.5e9"]
