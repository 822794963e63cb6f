"""Timelines of simulated and measured runs: SVG, HTML and PNG, without other libraries."""

from ds_pipe.draw.raster import png
from ds_pipe.draw.vector import html, svg

__all__ = ["html", "png", "svg"]
