"""PagedOptimizer in other processes: spawned ones make their own; a forked one cannot use its parent's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from ds_offload import CPUAdam, PagedOptimizer


def train(module: nn.Module, folder: str) -> list[float]:
    optimizer = PagedOptimizer(CPUAdam(module.parameters(), lr=1e-2), folder, page_bytes=1 << 15)
    for _ in range(3):
        module(torch.ones(2, 100)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    return [p.detach().double().sum().item() for p in module.parameters()]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(100, 100)


def spawned(rank: int, folder: str, queue: Any, shared: nn.Module) -> None:
    torch.set_num_threads(1)
    queue.put((train(model(), folder), train(shared, folder) if rank == 0 else None))


def test_spawned_processes_train_in_one_folder(tmp_path: Path) -> None:
    queue = mp.get_context("spawn").SimpleQueue()
    shared = model()
    shared.share_memory()
    mp.spawn(spawned, args=(str(tmp_path), queue, shared), nprocs=2)  # type: ignore[no-untyped-call]
    results = [queue.get() for _ in range(2)]
    expected = train(model(), str(tmp_path))
    assert all(own == expected for own, _ in results)
    # What the parent has in shared memory was trained by the child.
    assert [p.detach().double().sum().item() for p in shared.parameters()] == expected
    assert not list(tmp_path.iterdir())


def test_a_forked_process_is_told_to_make_its_own(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    try:
        module = model()
        optimizer = PagedOptimizer(CPUAdam(module.parameters(), lr=1e-2), tmp_path, page_bytes=1 << 15)
        module(torch.ones(2, 100)).sum().backward()
        optimizer.step()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                optimizer.step()
                os.write(writer, b"stepped")
            except Exception as error:
                os.write(writer, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        said = os.read(reader, 10_000).decode()
        assert "do not exist in the forked process" in said and "make an engine after the fork" in said
        optimizer.step()
        optimizer.close()
    finally:
        torch.set_num_threads(threads)
