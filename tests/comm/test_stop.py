"""All ranks stop after the same step, whichever of them got the signal."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

import ds_comm
from engine.launching import Job
from harness import ranks


def stopped_after(stop: ds_comm.StopRequest, signalled: int, at: int, steps: int = 12) -> int:
    for step in range(1, steps + 1):
        if step == at and (not dist.is_initialized() or dist.get_rank() == signalled):
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.agreed():
            return step
    return 0


@ranks(3)
@pytest.mark.parametrize("signalled", [0, 2])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(signalled: int) -> None:
    with ds_comm.StopRequest() as stop:
        assert stop.exit_code == 0
        assert stopped_after(stop, signalled, at=4) == 4
        assert stop.noted == (dist.get_rank() == signalled)
        assert stop.agreed() and stop.exit_code == 143


@ranks(2)
def test_an_exchange_every_few_steps() -> None:
    with ds_comm.StopRequest(every=5) as stop:
        assert stopped_after(stop, signalled=1, at=6) == 10


def test_one_process_without_a_group() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ds_comm.StopRequest() as stop:
        assert stopped_after(stop, 0, at=2) == 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_interrupts_and_one_that_is_forwarded_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ds_comm.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # within a second: the same request
        assert stop.agreed() and stop.exit_code == 130
        monkeypatch.setattr(stop, "_noted_s", -10.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with ds_comm.StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop.noted and not stop.agreed()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no signal 'TERM'"):
        ds_comm.StopRequest(["TERM"])
    with pytest.raises(ValueError, match="every=0"):
        ds_comm.StopRequest(every=0)
    caught: list[str] = []

    def enter() -> None:
        try:
            with ds_comm.StopRequest():
                pass
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_a_job_under_sigterm_saves_on_every_rank(tmp_path: Path) -> None:
    source = """
import ds_comm
ds_comm.start()
with ds_comm.StopRequest() as stop:
    mark("up")
    for step in range(10_000):
        time.sleep(0.01)
        if stop.agreed():
            (HERE / f"saved{RANK}").write_text(str(step))
            break
sys.exit(stop.exit_code)
"""
    job = Job(tmp_path, source, "-n", "2", "--max-restarts", "3")
    job.pids("up")
    job.process.send_signal(signal.SIGTERM)
    code, _, err = job.finish()
    assert code == 143, err
    assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text()
    assert "failed first" not in err and "restart" not in err
