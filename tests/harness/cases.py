"""Bodies that end badly, each in its own way: run by test_pool.py, which looks at what is reported."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


def fails_on(rank: int) -> None:
    values = [1, 2, dist.get_rank()]
    if dist.get_rank() == rank:
        assert values == [1, 2, 99]


def all_fail_rank_1_first() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    dist.recv(torch.zeros(1), src=1)  # fails or hangs: rank 1 is gone


def rank_1_fails_then_rank_0() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the cause")
    time.sleep(0.3)
    raise ValueError("the consequence")


def hangs_on_rank_0() -> None:
    if dist.get_rank() == 0:
        threading.Thread(target=_wait_in_a_thread, name="helper", daemon=True).start()
        dist.recv(torch.zeros(1), src=1)


def _wait_in_a_thread() -> None:
    threading.Event().wait()


def is_killed_on_rank_1(signal_number: int) -> None:
    print("before the signal")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal_number)
    dist.barrier()


def leaves_by_exit(code: int) -> None:
    if dist.get_rank() == 0:
        os._exit(code)
    dist.barrier()


def exits(code: int) -> None:
    sys.exit(code)


def leaves_a_thread() -> None:
    threading.Thread(target=_wait_in_a_thread, name="forgotten", daemon=True).start()


def leaves_a_group() -> None:
    dist.new_group([0, 1])


def leaves_a_child_and_fails(pid_file: Path) -> None:
    if dist.get_rank() == 0:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        pid_file.write_text(str(child.pid))
    raise AssertionError("after the child has started")


def takes_the_group_down() -> None:
    dist.destroy_process_group()


def issues_one_collective_more_on_rank_0() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(3), async_op=True)


def skips_on(first: int) -> None:
    if dist.get_rank() >= first:
        pytest.skip(f"needs fewer than {first + 1} ranks")


def xfails() -> None:
    pytest.xfail("known")


def warns() -> None:
    warnings.warn("something is old", DeprecationWarning, stacklevel=1)


class _DropsBadly:
    def __del__(self) -> None:
        raise OSError("not closed")


def raises_in_del() -> None:
    _DropsBadly()


def raises_in_a_thread() -> None:
    thread = threading.Thread(target=warnings.warn, args=(DeprecationWarning("from a thread"),))
    thread.start()
    thread.join()


def disturbs_everything(folder: Path) -> None:
    os.environ["DS_DISTURBED"] = "1"
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(17)


def finds_everything_in_order(cwd: str) -> None:
    assert "DS_DISTURBED" not in os.environ
    assert str(Path.cwd()) == cwd
    assert cwd not in ("", "/")
    assert torch.get_num_threads() == 1
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.initial_seed() == 0


def writes_its_pid(folder: Path) -> None:
    (folder / f"{os.getpid()}").touch()


def says(text: str) -> None:
    print(text)
    os.write(2, b"from native code\n")
