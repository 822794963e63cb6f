"""Hosts for the tests of jobs on several machines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from harness import hosts


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hosts.Network]:
    """Two hosts, host-a and host-b."""
    lacks = hosts.missing()
    if lacks is not None:
        pytest.skip(lacks)
    with hosts.network(tmp_path_factory.mktemp("hosts") / "net") as made:
        yield made
