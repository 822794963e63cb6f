"""The section `stall_reports`: a rank that others wait for is named without a line of code."""

from __future__ import annotations

import logging
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_engine
from harness import ranks


def engine_of(**more: object) -> ds_engine.Engine:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "startup_summary": False,
        **more,
    }
    return ds_engine.initialize(nn.Linear(3, 2), config)[0]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@ranks(2)
def test_a_rank_that_comes_late_is_reported_with_parameter_and_line() -> None:
    original, lines = dist.all_reduce, Lines()
    logging.getLogger("ds_comm").addHandler(lines)
    try:
        for _ in range(2):  # the watch of a second engine reports, too
            lines.texts.clear()
            engine = engine_of(stall_reports={"enabled": True, "timeout_s": 0.4})
            assert dist.all_reduce is not original
            dist.barrier()
            begin = time.monotonic()
            if dist.get_rank() == 1:
                time.sleep(2.5)
            with torch.no_grad():
                dist.all_reduce(engine.module.weight)
            assert time.monotonic() - begin < 0.4 + 5 + 2.5
            told: list[list[str]] = [[], []]
            dist.all_gather_object(told, lines.texts)
            text = next(text for one in told for text in one if "has not called it" in text)
            assert "rank 0 waits since" in text and "all_reduce of weight (float32[2, 3])" in text
            assert "rank 1 has not called it: it is at" in text and f"{__file__}:" in text
            engine.destroy()
            assert dist.all_reduce is original
    finally:
        logging.getLogger("ds_comm").removeHandler(lines)
    for launcher, enabled, watched in (("ds run", None, True), ("ds run", False, False), ("", None, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("DS_LAUNCHER", raising=False)
            if launcher:
                patch.setenv("DS_LAUNCHER", launcher)
            engine = engine_of(stall_reports={"enabled": enabled})
        assert (dist.all_reduce is not original) == watched
        engine.destroy()
