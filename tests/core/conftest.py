"""What the tests of ds_core share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ds_core import _native

TARGETS = tuple(_native.core.available_cpu_targets())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tests of threading ask for more: on a busy machine every team waits its turn
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every CPU target that this machine can run, one after the other."""
    _native.core.set_cpu_target(request.param)
    yield request.param
    _native.core.set_cpu_target("")
