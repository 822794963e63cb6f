"""Engines of both backends, and the injection of faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.io.faults import Fault
from ds_core import _native
from ds_core.io import Engine

BACKENDS = ("io_uring", "threads")
NO_URING = _native.core.io_uring_reason()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "io_uring" and NO_URING:
        pytest.skip(f"this process cannot use it: {NO_URING}")
    return str(request.param)


@pytest.fixture
def inject() -> Iterator[Callable[..., None]]:
    """Replaces the faults; all are gone after the test."""

    def replace(*faults: Fault) -> None:
        _native.core._io_set_faults(faults)

    yield replace
    _native.core._io_set_faults([])


@pytest.fixture
def engine(backend: str) -> Iterator[Engine]:
    with Engine(backend=backend, block_bytes=8192, queue_depth=4) as made:  # type: ignore[arg-type]
        yield made


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    """O_DIRECT wanted or not; skipped where the folder of the tests has none."""
    if request.param:
        with Engine(backend="threads") as probe, probe.open(tmp_path / "probe", create=True) as file:
            if not file.direct:
                pytest.skip(f"no direct I/O in {tmp_path}: {file.reason}")
    return bool(request.param)
