"""A page as one file: style and script stand in it, so it opens without a network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<div id="tip" role="tooltip"></div>
<script>
{script}</script>
</body>
</html>
"""


def document(title: str, body: str) -> str:
    """A page whose body may hold charts.

    Args:
        title: plain text.
        body: HTML.
    """
    return _PAGE.format(title=html.escape(title), style=style(), body=body, script=_part("charts.js"))


def style() -> str:
    """The style that all pages share."""
    return _part("style.css")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls where it is wider than the screen. Cells are HTML."""
    head = "".join(f"<th>{text}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _part(name: str) -> str:
    return resources.files("ds_profiler.html").joinpath(name).read_text(encoding="utf-8")
