"""Frozen parameters in 8 bits, on a disk and in host memory: the same bits as on the device, and a byte an element."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_comm
import ds_zero
from ds_offload import CPUAdam, HostStore, NVMeStore
from ds_zero import ZeroConfig, _registry
from harness import ranks

ALL = ("param", "master", "grad")
CONFIG = ZeroConfig(param_dtype=torch.bfloat16, persistence_threshold_numel=0)


def lora() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64), nn.Linear(64, 64))
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    return model


def trained(store: Any) -> tuple[list[Tensor], dict[str, Tensor], int, Any]:
    """Returns the losses, the whole model on rank 0, and the bytes of frozen parameters and of the store's disk."""
    model = lora()
    adam = CPUAdam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    comm = ds_comm.collectives(frozen=ds_comm.QuantizedFrozen())
    model, optimizer = ds_zero.shard(model, adam, stage=3, config=CONFIG, comm=comm, store=store)
    losses = []
    for step in range(4):
        draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
        optimizer.zero_grad()
        loss = model(torch.randn(8, 64, generator=draw).bfloat16()).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    frozen_bytes: int = _registry.state_of(model).store.num_bytes
    whole = {name: value.clone() for name, value in ds_zero.full_state_dict(model).items()}
    on_disk = store.num_bytes if isinstance(store, NVMeStore) else 0
    ds_zero.destroy(model)
    return losses, whole, frozen_bytes, on_disk


@ranks(2)
def test_the_same_bits_wherever_codes_are_kept() -> None:
    with tempfile.TemporaryDirectory() as folder:
        same_everywhere(Path(folder))


def same_everywhere(folder: Path) -> None:
    expected, whole, num_bytes, _ = trained(None)
    numel = sum(p.numel() for p in lora().parameters() if not p.requires_grad)
    assert num_bytes == pytest.approx(numel / 2 * (1 + 4 / 256), rel=0.02)
    only_params = NVMeStore(folder, ("param",), host=("master", "grad"))
    for store in (HostStore(ALL), NVMeStore(folder, ALL), only_params):
        losses, again, same_bytes, on_disk = trained(store)
        assert all(torch.equal(a, b) for a, b in zip(expected, losses, strict=True))
        assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
        assert same_bytes == num_bytes
        if isinstance(store, NVMeStore):
            params = 64 * 64 + 64  # of the trained layer: 2 bytes each, and 8 for master and gradient
            each = 2 if len(store.folders) == 1 else 10
            assert on_disk == pytest.approx(num_bytes + params / 2 * each, abs=8 * 4096)


def test_a_plan_counts_codes_on_a_disk_and_their_buffers() -> None:
    comm = ds_comm.collectives(frozen=ds_comm.QuantizedFrozen())
    batch = torch.zeros(8, 64)
    made = {
        with_codes: ds_zero.plan(
            lora,
            batch,
            loss=lambda y: y.float().square().mean(),
            stage=3,
            ranks=2,
            optimizer=CPUAdam,
            config=CONFIG,
            disk=ALL,
            device="cpu",
            comm=comm if with_codes else None,
        )
        for with_codes in (False, True)
    }
    numel = sum(p.numel() for p in lora().parameters() if not p.requires_grad)
    saved = made[False].disk_bytes - made[True].disk_bytes
    assert saved == pytest.approx(numel / 2 * (2 - 1 - 4 / 256), rel=0.03)
