"""Frozen parameters in 8 bits, in a plain loop with ds_zero: memory, equal values on all ranks, saving."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_comm
import ds_zero
from ds_comm.frozen import QuantizedFrozen
from ds_zero import ZeroConfig
from ds_zero.params.stores import ResidentStore
from harness import ranks

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Key:
    name: str
    kind: str


@dataclass(frozen=True)
class Item:
    key: Key
    numel: int
    dtype: torch.dtype
    partition: str = ""
    device: torch.device = CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 777.0])
def test_stored_values_are_those_that_their_message_has(dtype: torch.dtype, scale: float) -> None:
    frozen = QuantizedFrozen()
    store = frozen.stored_in(ResidentStore())
    key = Key("a", "param")
    items = [
        Item(key, 1000, dtype),
        Item(Key("b", "param"), 8, dtype),
        Item(Key("b", "grad"), 8, torch.float32),
    ]
    assert list(store.reserve(items)) == [items[1].key, items[2].key]  # those of a bucket that is trained
    values = (torch.randn(1000, generator=torch.Generator().manual_seed(3)) * scale).to(dtype)
    store.store(key, values).wait()
    read, again = torch.empty(1000, dtype=dtype), torch.empty(1000, dtype=dtype)
    store.load(key, read).wait()
    blocks = values.float().view(-1).split(256)
    for block, got in zip(blocks, read.float().split(256), strict=True):
        eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        assert (got - block).abs().max() <= block.abs().max() * (1 / 254 + 2 * eps)
    store.store(key, read).wait()
    store.load(key, again).wait()
    assert torch.equal(read, again)
    assert store.num_bytes == frozen.stored_bytes(1000, dtype) == 1024
    store.close()
    assert store.num_bytes == 0


def lora() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 32), nn.Linear(32, 1))
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    return model


@ranks(2)
def test_a_plain_loop_trains_as_a_model_with_the_values_that_are_read() -> None:
    model = lora()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    comm = ds_comm.collectives(frozen=ds_comm.QuantizedFrozen())
    config = ZeroConfig(persistence_threshold_numel=0)
    model, optimizer = ds_zero.shard(model, adam, stage=3, config=config, comm=comm)
    plain = lora()
    with ds_zero.gathered(model.parameters()):
        plain.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    reference = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x[dist.get_rank()]).square().mean().backward()
        optimizer.step()
        reference.zero_grad()
        plain(x).square().mean().backward()
        reference.step()
    saved = ds_zero.full_state_dict(model)
    for name, value in plain.state_dict().items():
        if dist.get_rank() == 0:
            torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-5)
    ds_zero.destroy(model)


def test_lower_stages_keep_frozen_parameters_whole() -> None:
    model = lora()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model[0].weight.detach().clone()
    model, _ = ds_zero.shard(model, adam, stage=2, comm=ds_comm.collectives(frozen=QuantizedFrozen()))
    assert torch.equal(model[0].weight, before)
