"""What holds for every test: a known state of torch, and `gpu` tests only where there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from harness import hosts


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.accelerator.is_available():
            pytest.skip("needs a GPU: torch.accelerator finds none on this machine")


@pytest.fixture(autouse=True)
def _torch_state() -> None:
    """One intra-op thread and seed 0 at the start of every test, as on the ranks: tests share the cores.

    A test that never imports torch does not pay for it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Network]:
    """Two hosts, host-a and host-b."""
    lacks = hosts.missing()
    if lacks is not None:
        pytest.skip(lacks)
    with hosts.network(tmp_path_factory.mktemp("hosts") / "net") as made:
        yield made
