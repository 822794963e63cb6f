"""Samples a second, with a clock that the test moves."""

from __future__ import annotations

import pytest
from deepspeed.utils.timer import ThroughputTimer

from compat.engine.test_engine import batch, make


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("ds_compat.utils.timer.time.time", lambda: now[0])
    return now


def test_steps_are_counted_after_the_first_ones(clock: list[float]) -> None:
    lines: list[str] = []
    timer = ThroughputTimer(batch_size=12, start_step=2, steps_per_output=2, logging_fn=lines.append)
    assert not timer.initialized and timer.avg_samples_per_sec() == float("-inf")
    timer.stop(global_step=True)
    assert timer.global_step_count == timer.micro_step_count == 0  # nothing was started
    for step in range(4):
        for micro in range(2):
            timer.start()
            clock[0] += 1.5
            timer.stop(global_step=micro == 1)
            clock[0] += 100.0  # between micro-batches nothing is counted
        assert timer.step_elapsed_time == 0
        assert timer.total_elapsed_time == 3.0 * max(0, step - 1)
    assert (timer.global_step_count, timer.micro_step_count) == (4, 8)
    assert timer.avg_samples_per_sec() == pytest.approx(12 * 2 / 6.0)
    assert len(lines) == 1 and "4.00 samples/s in the mean" in lines[0]
    timer.update_epoch_count()
    assert (timer.epoch_count, timer.micro_step_count) == (1, 0)


def test_the_engine_drives_it() -> None:
    engine = make(0, 2)
    for step in range(4):
        assert engine.tput_timer.micro_step_count == step
        engine.backward(engine(*batch(step)))
        engine.step()
    assert engine.tput_timer.global_step_count == 2
    assert engine.tput_timer.batch_size == engine.train_batch_size()
    engine.eval()
    engine(*batch(0))
    assert not engine.tput_timer.started
    engine.destroy()
