"""Timelines as SVG, and as a HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ds_pipe.draw.timeline import LEGEND, Box, Colour, boxes
from ds_pipe.simulate.results import Span

_ROW, _GAP, _LEFT, _TOP = 28, 6, 56, 26


def svg(spans: Sequence[Span], *, unit: str = "s", width: int = 1200) -> str:
    """Returns a timeline as the text of an SVG picture; the title of each rectangle names its action and time.

    Args:
        spans: what ran, as in `Simulation.spans`.
        unit: the unit of its times.
        width: width in pixels.
    """
    ranks = 1 + max((span.rank for span in spans), default=0)
    height = _TOP + ranks * (_ROW + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for rank in range(ranks):
        y = _TOP + rank * (_ROW + _GAP)
        lines.append(f'<text x="4" y="{y + _ROW * 0.65:g}">rank {rank}</text>')
        lines.append(
            f'<rect x="{_LEFT}" y="{y}" width="{width - _LEFT - 4}" height="{_ROW}" fill="#f2f2f2"/>'
        )
    lines += [_rectangle(box, width - _LEFT - 4) for box in boxes(spans, unit)]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _legend() -> list[str]:
    lines, x = [], _LEFT
    for name, colour in LEGEND.items():
        lines.append(f'<rect x="{x}" y="6" width="12" height="12" fill="{_hex(colour)}"/>')
        lines.append(f'<text x="{x + 16}" y="16">{name}</text>')
        x += 32 + 7 * len(name)
    return lines


def _rectangle(box: Box, width: int) -> str:
    x, w = _LEFT + box.left * width, box.width * width
    y = _TOP + box.rank * (_ROW + _GAP) + (0 if box.computes else _ROW)
    h = _ROW if box.computes else 4
    label = ""
    if box.label and w > 7 * len(box.label):
        label = f'<text x="{x + w / 2:.2f}" y="{y + 18}" text-anchor="middle" fill="white">{box.label}</text>'
    return (
        f'<g><title>{escape(box.title)}</title><rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{h}" '
        f'fill="{_hex(box.colour)}" stroke="white" stroke-width="0.6"/>{label}</g>'
    )


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def html(spans: Sequence[Span], *, title: str, facts: Mapping[str, str], unit: str = "s") -> str:
    """Returns a HTML page with the timeline and a table.

    Args:
        spans: what ran.
        title: heading of the page.
        facts: rows of the table.
        unit: the unit of the times.
    """
    rows = "\n".join(
        f"<tr><th align=left>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items()
    )
    return (
        f"<!doctype html>\n<html><head><meta charset=utf-8><title>{escape(title)}</title></head>\n"
        f"<body style='font-family:sans-serif'><h1>{escape(title)}</h1>\n{svg(spans, unit=unit)}"
        f"<table cellpadding=4>\n{rows}\n</table></body></html>\n"
    )
