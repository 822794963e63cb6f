"""Stacked bars as SVG: what something is made of, in one or several cases."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_profiler.html.charts import COLOURS, SCALES, Unit, number_text, ticks

_WIDTH, _LEFT, _RIGHT, _ROW, _BAR, _FOOT = 440, 92, 14, 30, 20, 22


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One horizontal bar for each case. A part has the same colour in all bars."""

    title: str
    bars: Sequence[tuple[str, Mapping[str, float]]]
    """Name of a case, and part -> value, which is not negative."""
    unit: Unit = ""

    def svg(self) -> str:
        """The bars as a `figure` element, with a legend; the values of a part are shown under the pointer."""
        parts = list(dict.fromkeys(part for _, bar in self.bars for part, value in bar.items() if value > 0))
        head = f"<figcaption>{html.escape(self.title)}</figcaption>"
        longest = max((sum(bar.values()) for _, bar in self.bars), default=0.0)
        if not longest:
            return f"<figure>{head}<p>no values</p></figure>"
        scale, unit = next((s for s in SCALES[self.unit] if longest >= s[0]), SCALES[self.unit][-1])
        colour = {part: COLOURS[number % len(COLOURS)] for number, part in enumerate(parts)}
        along = (_WIDTH - _LEFT - _RIGHT) / longest
        height = _ROW * len(self.bars) + _FOOT
        drawn = []
        for tick in ticks(0.0, longest / scale, 5):
            x = _LEFT + tick * scale * along
            drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - _FOOT}"/>')
            drawn.append(_text(x, height - 6, number_text(tick), "middle"))
        for number, (name, bar) in enumerate(self.bars):
            y, x = _ROW * number + (_ROW - _BAR) / 2, float(_LEFT)
            drawn.append(_text(_LEFT - 6, y + _BAR / 2 + 4, name, "end"))
            for part in parts:
                width = bar.get(part, 0.0) * along
                if width <= 0:
                    continue
                told = html.escape(f"{name}, {part}: {bar[part] / scale:.4g} {unit}".strip())
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_BAR}" fill="{colour[part]}">'
                    f"<title>{told}</title></rect>"
                )
                x += width
        legend = "".join(
            f'<span><i style="background:{colour[part]}"></i>{html.escape(part)}</span>' for part in parts
        )
        label = f"{self.title} ({unit})" if unit else self.title
        return (
            f'<figure>{head}<div class="legend">{legend}</div>'
            f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(label)}">'
            f"{''.join(drawn)}</svg><p>{html.escape(unit)}</p></figure>"
        )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
