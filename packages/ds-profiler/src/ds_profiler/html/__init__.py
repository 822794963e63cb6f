"""Parts of the pages that this package writes: one style, tables, and charts that need only a browser."""

from ds_profiler.html.bars import Bars
from ds_profiler.html.charts import Chart, Line, Unit
from ds_profiler.html.document import document, style, table

__all__ = ["Bars", "Chart", "Line", "Unit", "document", "style", "table"]
