"""Stacked bars."""

from __future__ import annotations

import re

from ds_profiler.html import Bars


def test_parts_have_lengths_in_proportion_and_one_colour() -> None:
    bars = [("first", {"a": 3 * 2.0**20, "b": 2.0**20}), ("<second>", {"b": 2.0**20, "none": 0.0})]
    drawn = Bars(title="Memory", bars=bars, unit="bytes").svg()
    rects = re.findall(r'width="([0-9.]+)" height="20" fill="(#[0-9a-f]+)"><title>([^<]*)<', drawn)
    assert [told for *_, told in rects] == ["first, a: 3 MiB", "first, b: 1 MiB", "&lt;second&gt;, b: 1 MiB"]
    widths = [float(width) for width, *_ in rects]
    assert abs(widths[0] - 3 * widths[1]) < 0.5 and widths[1] == widths[2]
    assert rects[1][1] == rects[2][1] != rects[0][1]
    assert "none" not in drawn and "<second>" not in drawn


def test_nothing_to_draw_is_said() -> None:
    assert "no values" in Bars(title="Empty", bars=[("x", {})]).svg()
