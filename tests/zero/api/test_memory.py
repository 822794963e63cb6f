"""A report of memory reads as sizes."""

from __future__ import annotations

import ds_zero


def test_a_report_prints_sizes_and_leaves_out_what_holds_nothing() -> None:
    report = ds_zero.MemoryReport(
        params_bytes=3 * 2**20,
        masters_bytes=0,
        grads_bytes=0,
        optimizer_bytes=1536,
        buffers_bytes=7,
        gathered_bytes=0,
    )
    lines = [line.split(maxsplit=1) for line in str(report).splitlines()]
    assert lines == [
        ["params", "3.0 MiB"],
        ["optimizer", "1.5 KiB"],
        ["buffers", "7 B"],
        ["total", "3.0 MiB"],
    ]
