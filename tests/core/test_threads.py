"""Threads: torch's number is respected, forks survive, results do not change."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ds_core import kernels, threads


class Norms(Dataset[float]):
    """Calls a kernel in a DataLoader's worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        x = torch.full((300_000,), float(index + 1))
        torch.set_num_threads(
            2
        )  # the loader sets 1, which needs no team; with 2, torch's own operations hang here
        norm = kernels.squared_norm([x])[0]
        torch.set_num_threads(1)
        return norm


def test_a_forked_dataloader_worker_can_call_kernels() -> None:
    torch.set_num_threads(2)
    expected = [300_000.0 * (i + 1) ** 2 for i in range(4)]
    assert kernels.squared_norm([torch.full((300_000,), 1.0)])[0] == expected[0]  # the parent's team exists
    loader = DataLoader(Norms(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert list(loader) == expected


def test_concurrent_callers() -> None:
    torch.set_num_threads(2)
    x = torch.randn(500_000)
    expected = kernels.squared_norm([x])
    results: list[tuple[float, bool]] = []

    def call() -> None:
        results.extend(kernels.squared_norm([x]) for _ in range(10))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [expected] * 40


COUNT = """
import os, sys, torch
from ds_core import _native, kernels
torch.set_num_threads(int(sys.argv[1]))
x = torch.frombuffer(bytearray(12_000_000), dtype=torch.float32)  # made without torch's threads
before = len(os.listdir("/proc/self/task"))  # torch has a pool of its own that no kernel uses
for _ in range(20):
    kernels.squared_norm([x])
print(_native.core.thread_source(), 1 + len(os.listdir("/proc/self/task")) - before)
"""


def count(num_threads: int, source: str) -> tuple[str, int]:
    environment = {**os.environ, "DS_THREADS": source, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(num_threads)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    name, number = done.stdout.split()
    return name, int(number)


def test_one_thread_means_no_team() -> None:
    assert count(1, "own") == ("own", 1)


def test_the_own_pool_has_torch_s_number_of_threads() -> None:
    assert count(3, "own") == ("own", 3)


def test_the_team_of_torch_is_borrowed() -> None:
    assert Path("/proc/self/task").is_dir()
    assert count(2, "openmp") == ("openmp", 2)


def test_a_limit_leaves_threads_and_changes_no_bits() -> None:
    torch.set_num_threads(4)
    assert threads.count() == 4
    with threads.limited(3):
        assert threads.count() == 3
        with threads.limited(None):
            assert threads.count() == 3
        with threads.limited(9):
            assert threads.count() == 4
    assert threads.count() == 4
    code = "import torch; torch.set_num_threads(4); from ds_core import threads; print(threads.count())"
    for value, said in (
        ("2", "2"),
        ("", "4"),
        ("two", "DS_CPU_THREADS is 'two': it must be a number of threads"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "DS_CPU_THREADS": value},
            capture_output=True,
            text=True,
        )
        assert said in done.stdout + done.stderr


def test_bound_kernels_compute_on_their_cores_with_the_same_bits() -> None:
    torch.set_num_threads(2)
    x = torch.randn(1_000_000)
    own = sorted(os.sched_getaffinity(0))
    expected = kernels.squared_norm([x])
    with threads.bound(own[-1:]):
        assert threads.count() == 1
        assert kernels.squared_norm([x]) == expected
        with threads.bound(own[:2]):
            assert threads.count() == len(own[:2])
            assert kernels.squared_norm([x]) == expected
        assert threads.count() == 1
    assert threads.count() == 2
    assert sorted(os.sched_getaffinity(0)) == own
    with threads.bound(None):
        assert threads.count() == 2
    with pytest.raises(ValueError, match=r"cores=\[9999\]: give at least one of the cores of this process"):
        threads.bound([9999]).__enter__()
