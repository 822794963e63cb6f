"""Which device a rank takes, on machines that this one only pretends to be."""

from __future__ import annotations

import pytest
import torch

from ds_comm import Placement, PlacementError
from ds_comm.device import choose_device, default_backend


def _placement(local_rank: int) -> Placement:
    return Placement(
        rank=local_rank,
        world_size=8,
        local_rank=local_rank,
        local_size=8,
        master_addr="127.0.0.1",
        master_port=1,
        source="torchrun",
    )


def _pretend(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int) -> None:
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_each_local_rank_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "xpu", 4)
    assert [choose_device(None, _placement(i)).index for i in range(4)] == [0, 1, 2, 3]
    assert choose_device("xpu", _placement(2)) == torch.device("xpu", 2)
    assert choose_device("xpu:3", _placement(2)) == torch.device("xpu", 3)
    assert choose_device("cpu", _placement(2)) == torch.device("cpu")
    with pytest.raises(PlacementError, match=r"local rank 4 has no xpu device of its own, 4 are visible"):
        choose_device(None, _placement(4))


def test_a_single_visible_device_is_everybodys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, "xpu", 1)
    assert choose_device(None, _placement(5)) == torch.device("xpu", 0)


def test_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, None, 0)
    assert choose_device(None, _placement(0)) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"finds no accelerator: .*request 'cpu'"):
        choose_device("xpu", _placement(0))
    _pretend(monkeypatch, "mps", 1)
    with pytest.raises(ValueError, match="finds an accelerator of type 'mps'"):
        choose_device("xpu", _placement(0))


def test_backends() -> None:
    assert default_backend(torch.device("cpu")) == "gloo"
    assert default_backend(torch.device("cuda")) == "nccl"
