"""Times and memory of the parts of a step."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

import ds_engine
from ds_engine.training.timing import BACKWARD, FORWARD, STEP, Breakdown, memory


def breakdown(
    written: list[str], *, time_on: bool = True, memory_on: bool = False, every: int = 1
) -> Breakdown:
    device = torch.device("cpu")
    return Breakdown(time_on=time_on, memory_on=memory_on, device=device, every=every, write=written.append)


def test_micro_batches_of_a_step_add_up_and_means_are_written_every_so_often() -> None:
    written: list[str] = []
    parts = breakdown(written, every=2)
    for step in (1, 2):
        for _ in range(3):
            with parts.part(FORWARD):
                time.sleep(0.002)
        with parts.part(STEP):
            pass
        times = parts.end_step(step)
        assert times[FORWARD] >= 6 > times[STEP] >= 0 and times[BACKWARD] == 0
    assert len(written) == 1
    found = re.fullmatch(
        r"step 2: milliseconds a step, mean of 2: forward (\S+), backward 0.00, step (\S+)", written[0]
    )
    assert found is not None and float(found[1]) >= 6


def test_memory_is_written_after_each_part() -> None:
    written: list[str] = []
    parts = breakdown(written, time_on=False, memory_on=True)
    with parts.part(FORWARD):
        pass
    assert parts.end_step(1) == {}
    assert re.fullmatch(r"memory after forward: \d+ MiB resident, \d+ at most", written[0])


def test_turned_off_it_does_nothing() -> None:
    written: list[str] = []
    parts = breakdown(written, time_on=False)
    with parts.part(FORWARD):
        pass
    assert parts.end_step(1) == {} and not written


def test_resident_memory_counts_what_is_touched() -> None:
    def held() -> int:
        return int(memory(torch.device("cpu")).split()[0])

    before = held()
    block = torch.ones(32 << 20, dtype=torch.uint8)
    assert 24 <= held() - before <= 48
    del block


def test_the_engine_measures_its_parts_and_writes_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "startup_summary": False,
        "steps_per_print": 2,
    }
    config |= {"wall_clock_breakdown": True, "memory_breakdown": True}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "gradient_clipping": 0.0}
    config |= {"csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}}
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    engine, *_ = ds_engine.initialize(model=model, config=config)
    with engine:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for value in (1.0, 3.0, 2.0, 4.0):  # two steps of two micro-batches; the loss is weight * value
                engine.backward(engine(torch.tensor([[value]])).sum())
                engine.step()
        engine.monitor.write_events([("mine", 7.0, 8)])
    ranges = {
        event.key: event.count for event in profiler.key_averages() if event.key.startswith("ds.engine.")
    }
    assert ranges == {"ds.engine.forward": 4, "ds.engine.backward": 4, "ds.engine.step": 2}
    said = capsys.readouterr().err
    assert re.search(r"step 2: milliseconds a step, mean of 2: forward \d", said)
    assert said.count("memory after forward") == 4 and said.count("memory after step") == 2

    def curve(name: str) -> list[str]:
        return (tmp_path / "job" / f"{name}.csv").read_text().splitlines()[1:]

    # The gradient of the first step is 2, so the weight is 1 - 0.5 * 2 = 0 in the second one.
    assert curve("Train_Samples_train_loss") == ["4,2.0", "8,0.0"]
    assert curve("Train_Samples_lr") == ["4,0.5", "8,0.5"] and curve("Train_Samples_grad_norm") == [
        "4,2.0",
        "8,3.0",
    ]
    assert curve("mine") == ["8,7.0"] and len(curve("Train_Samples_elapsed_time_ms_forward")) == 2
