"""What a training job did, as one page: curves, configuration, dates."""

from ds_profiler.report.page import page, write_report
from ds_profiler.report.run import Run, read_run

__all__ = ["Run", "page", "read_run", "write_report"]
