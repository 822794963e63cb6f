"""A training whose state is on a disk that fails: it goes on unharmed, or ends with an error that says where."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_zero
from core.io.faults import Fault, fault
from ds_core import _native
from ds_offload import CPUAdam, NVMeOptions, NVMeStore, PagedOptimizer, PagingError
from offload.nvme.test_store import the_files
from zero.models import Tiny, batch

ALL = ("param", "master", "grad", "state")
Inject = Callable[..., None]


@pytest.fixture
def inject() -> Iterator[Inject]:
    """Replaces the faults of the system calls; all are gone after the test."""

    def replace(*faults: Fault) -> None:
        _native.core._io_set_faults(faults)

    yield replace
    _native.core._io_set_faults([])


class Training:
    """A sharded model with all of its state on a disk."""

    def __init__(self, folder: Path, backend: str) -> None:
        torch.manual_seed(0)
        self.model = Tiny(layers=4)
        self.store = NVMeStore(folder, ALL, options=NVMeOptions(backend=backend))  # type: ignore[arg-type]
        self.optimizer = PagedOptimizer(
            CPUAdam(self.model.parameters(), lr=1e-2), self.store, page_bytes=16384
        )
        config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, persistence_threshold_numel=0)
        ds_zero.shard(self.model, self.optimizer, 3, config=config, store=self.store)  # type: ignore[arg-type]
        self.steps = 0

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = self.model(*batch(self.steps, 0))
            loss.backward()
            ds_zero.clip_grad_norm_(self.model, 0.3)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            self.steps += 1
        return losses


@pytest.fixture(params=["io_uring", "threads"])
def training(request: pytest.FixtureRequest, tmp_path: Path) -> Training:
    return Training(tmp_path, request.param)


@pytest.mark.parametrize(
    "faults",
    [
        [fault("read", at_most=777, times=-1), fault("write", at_most=1000, times=-1)],
        [fault("read", code=errno.EINTR, times=40), fault("write", code=errno.EAGAIN, times=10)],
    ],
    ids=["short", "interrupted"],
)
def test_short_and_interrupted_operations_change_nothing(
    training: Training, tmp_path: Path, inject: Inject, faults: list[Fault]
) -> None:
    expected = Training(tmp_path, "threads").run(4)
    inject(*faults)
    assert training.run(4) == expected


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_a_failed_operation_ends_the_step_with_file_and_offset(
    training: Training, inject: Inject, operation: str, code: int
) -> None:
    training.run(2)
    inject(fault(operation, code=code, skip=5, times=1))
    with pytest.raises((ds_zero.ShardStoreError, PagingError), match="continue from a checkpoint") as caught:
        training.run(4)
    cause: Any = caught.value.__cause__
    assert isinstance(cause, OSError) and cause.errno == code
    assert str(cause.filename).endswith(".swap") and f"{operation}" in str(caught.value)


def test_values_that_were_changed_on_the_disk_never_enter_training(
    training: Training, tmp_path: Path
) -> None:
    losses = training.run(2)
    assert all(torch.isfinite(torch.tensor(losses)))
    for number in the_files(tmp_path):
        for begin in range(0, os.fstat(number).st_size, 4096):  # one byte of every page
            old = os.pread(number, 1, begin)
            os.pwrite(number, bytes([old[0] ^ 0x40]), begin)
        os.fsync(number)
    with pytest.raises(
        (ds_zero.ShardStoreError, PagingError), match=r"SwapError: .* was changed on the disk"
    ):
        training.run(1)
