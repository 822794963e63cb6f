"""Lines of progress: loss, rate, and the time that is left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_engine.training.progress import Progress, StepReport, duration
from engine import jobs

REPORT = StepReport(step=0, samples=0, lr=0.01, grad_norm=2.0, clipped_norm=1.0)


def lines(total_steps: int | None, rank: int = 0) -> list[str]:
    """Of six steps of 5 s each."""
    now = [0.0]
    said: list[str] = []
    progress = Progress(3, rank, said.append, total_steps=total_steps, clock=lambda: now[0])
    for step in range(1, 7):
        now[0] += 5
        progress.report(replace(REPORT, step=step, samples=10 * step), loss=1 / step)
    return said


def test_a_line_has_loss_rate_and_time_left() -> None:
    said = lines(1000)
    assert said == [
        "step 3: loss 0.3333, lr 1.000e-02, gradient norm 2 (clipped to 1), 30 samples, 2 samples/s, "
        "83 min left of 1000 steps",
        "step 6: loss 0.1667, lr 1.000e-02, gradient norm 2 (clipped to 1), 60 samples, 2 samples/s, "
        "83 min left of 1000 steps",
    ]


def test_nothing_is_said_of_what_nobody_knows() -> None:
    assert not any("left" in line for line in lines(None))
    assert "left" not in lines(6)[1], "the last step"
    assert lines(1000, rank=1) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.2, "4 s"), (89, "89 s"), (720, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_engine_reports_its_mean_loss_and_knows_its_schedule(capfd: pytest.CaptureFixture[str]) -> None:
    schedule = {"type": "WarmupDecayLR", "params": {"total_num_steps": 50, "warmup_num_steps": 2}}
    engine = jobs.engine(1, steps_per_print=1, scheduler=schedule)
    losses = jobs.train(engine, 1)
    engine.destroy()
    said = capfd.readouterr().err
    assert f"loss {sum(losses) / 2:.4g}" in said and "left of 50 steps" in said
