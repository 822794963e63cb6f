"""Records: every logical element exactly once over all ranks, and back into any stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_offload import CPUAdam
from ds_zero.interfaces import EVERYWHERE, Coordinates
from harness import ranks
from zero.models import Tiny, batch

STAGES = [0, 1, 2, 3]


_Name = tuple[str, str, tuple[tuple[str, tuple[int, int]], ...]]


class Memory:
    """A checkpoint in memory, assembled from all ranks' records."""

    def __init__(self, records: list[ds_zero.ShardRecord]) -> None:
        self.tensors: dict[_Name, Tensor] = {}
        self.shapes: dict[_Name, tuple[int, ...]] = {}
        self.seen: dict[_Name, Tensor] = {}
        for r in records:
            key = (r.fqn, r.state, tuple(r.coordinates.items()))
            numel = torch.Size(r.global_shape).numel()
            whole = self.tensors.setdefault(key, torch.zeros(numel, dtype=r.data.dtype))
            seen = self.seen.setdefault(key, torch.zeros(numel, dtype=torch.int64))
            self.shapes[key] = r.global_shape
            whole[r.flat_offset : r.flat_offset + r.data.numel()] = r.data
            seen[r.flat_offset : r.flat_offset + r.data.numel()] += 1

    def states(
        self, fqn: str, coordinates: Coordinates = EVERYWHERE
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        at = tuple(coordinates.items())
        return {
            s: (self.shapes[n, s, c], t.dtype) for (n, s, c), t in self.tensors.items() if (n, c) == (fqn, at)
        }

    def read(
        self, fqn: str, state: str, flat_offset: int, out: Tensor, coordinates: Coordinates = EVERYWHERE
    ) -> None:
        whole = self.tensors[fqn, state, tuple(coordinates.items())]
        out.copy_(whole[flat_offset : flat_offset + out.numel()])


def everyones(records: list[ds_zero.ShardRecord]) -> list[ds_zero.ShardRecord]:
    if not dist.is_initialized():
        return records
    mine = [replace(r, data=r.data.clone()) for r in records]
    box: list[list[ds_zero.ShardRecord]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(box, mine)
    return [r for part in box for r in part]


def job(stage: int, optimizer: str, dtype: torch.dtype | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Tiny(tied=True, extras=True)
    make = {"adamw": torch.optim.AdamW, "cpuadam": CPUAdam}[optimizer]
    params = [p for p in model.parameters() if p.requires_grad]
    return ds_zero.shard(model, make(params, lr=1e-2), stage, config=ds_zero.ZeroConfig(param_dtype=dtype))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in steps:
        model(*batch(step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()


@ranks(1, 2, 4)
@pytest.mark.parametrize("stage", STAGES)
def test_every_element_once(stage: int) -> None:
    model, optimizer = job(stage, "adamw", torch.bfloat16)
    train(model, optimizer, range(2))
    found = Memory(everyones(ds_zero.records(model, optimizer)))
    assert all((count == 1).all() for count in found.seen.values())
    expected = {(n, "param") for n, _ in model.named_parameters()} | {("offset", "buffer")}
    trained = {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("unused")}
    expected |= {(n, s) for n in trained for s in ("exp_avg", "exp_avg_sq", "step")}
    assert set(found.tensors) == {(n, s, ()) for n, s in expected}
    assert all(found.shapes[n, "param", ()] == p.shape for n, p in model.named_parameters())


@ranks(2)
@pytest.mark.parametrize("optimizer", ["adamw", "cpuadam"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("target", STAGES)
@pytest.mark.parametrize("origin", [1, 3])
def test_training_goes_on_bitwise_at_another_stage(
    origin: int, target: int, dtype: torch.dtype | None, optimizer: str
) -> None:
    model, opt = job(origin, optimizer, dtype)
    train(model, opt, range(3))
    saved = Memory(everyones(ds_zero.records(model, opt)))
    train(model, opt, range(3, 6))
    expected = ds_zero.full_state_dict(model)

    torch.manual_seed(99)
    other, other_opt = job(target, optimizer, dtype)
    ds_zero.load_records(other, other_opt, saved)
    train(other, other_opt, range(3, 6))
    found = ds_zero.full_state_dict(other)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@ranks(2)
def test_loading_names_what_does_not_fit() -> None:
    model, optimizer = job(3, "adamw", None)
    saved = Memory(everyones(ds_zero.records(model, optimizer)))
    before = ds_zero.full_state_dict(model)
    del saved.tensors["frozen.weight", "param", ()]
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ tensors.*frozen\.weight"):
        ds_zero.load_records(model, optimizer, saved)
    saved = Memory(everyones(ds_zero.records(model, optimizer)))
    saved.shapes["frozen.weight", "param", ()] = (3, 75)
    with pytest.raises(ValueError, match=r"'frozen\.weight' has shape \(15, 15\) in the model and \(3, 75\)"):
        ds_zero.load_records(model, optimizer, saved)
    after = ds_zero.full_state_dict(model)
    assert all(torch.equal(after[n], before[n]) for n in before)


@ranks(2)
def test_states_that_were_not_saved_do_not_stay() -> None:
    """Saved before the first step, loaded into a run that has stepped: its moments must not go on."""
    model, optimizer = job(2, "adamw", None)
    saved = Memory(everyones(ds_zero.records(model, optimizer)))
    train(model, optimizer, range(2))
    expected = ds_zero.full_state_dict(model)
    ds_zero.load_records(model, optimizer, saved)
    assert not any(optimizer.state.values())
    train(model, optimizer, range(2))
    found = ds_zero.full_state_dict(model)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
