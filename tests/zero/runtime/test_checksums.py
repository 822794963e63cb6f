"""One bit that flips in a gradient, a master or an optimizer state is found at the next read; legal changes are not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import ds_core.optim
import ds_zero
from contracts.distant_store import DistantStore
from ds_offload import CPUAdam, HostStore, NVMeStore, PagedOptimizer
from ds_zero import _registry
from harness import ranks
from zero.models import Tiny, batch
from zero.params.test_records import Memory, everyones

BLOCK = 4096


@dataclass(frozen=True)
class Setup:
    """One way to train."""

    optimizer: Callable[..., Optimizer]
    stage: int
    states: tuple[str, ...]
    param_dtype: torch.dtype | None = None
    accumulation: Any = None
    host: bool = False
    layout: Any = None

    def shard(self, *, checksums: bool = True, **more: Any) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = Tiny(dim=48, tied=True)
        optimizer = self.optimizer(model.parameters(), lr=0.01)
        config = ds_zero.ZeroConfig(
            reduce_bucket_numel=9000,
            persistence_threshold_numel=200,
            param_dtype=self.param_dtype,
            accumulation=self.accumulation,
            layout=self.layout,
            checksums=checksums,
            **more,
        )
        store = HostStore() if self.host else None
        ds_zero.shard(model, optimizer, self.stage, config=config, store=store)
        return model, optimizer


ADAM = ("exp_avg", "exp_avg_sq")
BF16 = torch.bfloat16
SETUPS = {
    "0-fused": Setup(ds_core.optim.FusedAdam, 0, ADAM),
    "1-fused": Setup(ds_core.optim.FusedAdam, 1, ADAM),
    "1-torch-bf16": Setup(torch.optim.AdamW, 1, ADAM, BF16, "sharded"),
    "2-fused-bf16": Setup(ds_core.optim.FusedAdam, 2, ADAM, BF16, "local"),
    "2-host": Setup(CPUAdam, 2, ADAM, BF16, host=True),
    "2-sgd": Setup(lambda p, lr: ds_core.optim.FusedSGD(p, lr=lr, momentum=0.9), 2, ("momentum_buffer",)),
    "3-torch": Setup(torch.optim.AdamW, 3, ADAM),
    "3-fused": Setup(ds_core.optim.FusedAdam, 3, ADAM),
    "3-host-bf16": Setup(CPUAdam, 3, ADAM, BF16, host=True),
    "3-lamb": Setup(ds_core.optim.FusedLamb, 3, ADAM),
    "2-muon-whole": Setup(ds_core.optim.Muon, 2, ("momentum_buffer",), BF16),
}


def backward(model: nn.Module, step: int) -> None:
    model(*batch(step, dist.get_rank() if dist.is_initialized() else 0)).backward()


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def flip(values: Tensor, index: int, bit: int) -> None:
    """Changes one bit through numpy, so that no version counter of torch moves."""
    version = values._version
    values.detach().reshape(-1).view(torch.int32).numpy()[index] ^= 1 << bit
    assert values._version == version


def largest(optimizer: Optimizer) -> Tensor:
    """The largest entry of this rank."""
    return max((p for g in optimizer.param_groups for p in g["params"]), key=Tensor.numel)


def value_of(optimizer: Optimizer, shard: Tensor, kind: str) -> Tensor:
    value = {"gradient": shard.grad, "master": shard}.get(kind)
    return value if value is not None else optimizer.state[shard][kind]


def of_others(model: nn.Module) -> list[Tensor]:
    """The parameters that this rank gets from others by a step."""
    parts = []
    for bucket in _registry.state_of(model).buckets:
        if bucket.whole:
            begin, end = bucket.owned_range
            parts += [bucket.full[:begin].clone(), bucket.full[end:].clone()]
    return parts


def spoil(model: nn.Module, optimizer: Optimizer, kind: str, index: int, bit: int) -> str:
    """Flips a bit on rank 1. Returns the beginning of the error, on every rank."""
    text = [""]
    if dist.get_rank() == 1:
        shard = largest(optimizer)
        flip(value_of(optimizer, shard, kind), index, bit)
        names = ds_zero.group_names(model, optimizer)
        pairs = zip(optimizer.param_groups, names, strict=True)
        fqn = next(n for g, own in pairs for p, n in zip(g["params"], own, strict=True) if p is shard)
        first = index // BLOCK * BLOCK + ds_zero.local_range(model, fqn)[0]
        text = [f"checksums differ: on rank 1, {kind} of {fqn!r}, elements {first} to "]
    dist.broadcast_object_list(text, src=1)
    return text[0]


@contextlib.contextmanager
def raises_everywhere(beginning: str) -> Iterator[None]:
    with pytest.raises(ds_zero.ChecksumError) as error:
        yield
    assert str(error.value).startswith(beginning), beginning
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, str(error.value))
    assert len(set(said)) == 1, "all ranks say the same"


@ranks(2)
@pytest.mark.parametrize("name", SETUPS)
def test_a_flipped_bit_is_found_at_the_next_step(name: str) -> None:
    setup = SETUPS[name]
    for number, kind in enumerate(("gradient", "master", *setup.states)):
        model, optimizer = setup.shard()
        train(model, optimizer, 2)
        backward(model, 2)
        ds_zero.clip_grad_norm_(model, 0.1)
        before = of_others(model)
        with raises_everywhere(spoil(model, optimizer, kind, 1234 + 7 * number, 3 + 9 * number)):
            optimizer.step()
        if setup.stage > 0:
            assert all(map(torch.equal, of_others(model), before)), "no rank has received an update"
        with raises_everywhere("checksums differ: on rank 1, "):  # also later
            ds_zero.records(model, optimizer)
        ds_zero.destroy(model)


@ranks(2)
@pytest.mark.parametrize("name", ["2-host", "3-torch"])
def test_a_gradient_that_changes_between_two_micro_batches(name: str) -> None:
    model, optimizer = replace(SETUPS[name], accumulation="sharded").shard()
    train(model, optimizer, 1)
    backward(model, 1)
    beginning = spoil(model, optimizer, "gradient", 5, 30)
    backward(model, 2)
    with raises_everywhere(beginning):
        optimizer.step()


@ranks(2)
@pytest.mark.parametrize("name", ["1-fused", "3-host-bf16"])
def test_nothing_corrupted_is_saved_and_loading_goes_on(name: str) -> None:
    model, optimizer = SETUPS[name].shard()
    train(model, optimizer, 2)
    saved = Memory(everyones(ds_zero.records(model, optimizer)))
    for kind in ("master", "exp_avg_sq"):
        beginning = spoil(model, optimizer, kind, 77, 20)
        with raises_everywhere(beginning):
            ds_zero.records(model, optimizer)
        with raises_everywhere(beginning):
            ds_zero.full_state_dict(model)
        with raises_everywhere(beginning):
            ds_zero.dcp_state_dict(model, optimizer)["model"].state_dict()
        ds_zero.load_records(model, optimizer, saved)
        train(model, optimizer, 1)
        ds_zero.load_records(model, optimizer, saved)


def busy_training(setup: Setup, *, checksums: bool) -> list[Tensor]:
    """30 steps of 2 micro-batches in which values are changed in every legal way."""
    model, optimizer = setup.shard(checksums=checksums)
    name = next(name for name, _ in model.named_parameters())
    saved = Memory(everyones(ds_zero.records(model, optimizer)))
    for step in range(30):
        backward(model, 2 * step)
        if step % 6 == 1:
            with ds_zero.no_sync(model):
                backward(model, 3)
        if step % 7 == 2:
            ds_zero.get_full(model, name, "grad")
        backward(model, 2 * step + 1)
        if step % 3 == 0:
            ds_zero.clip_grad_norm_(model, 0.5)
        shards = [p for g in optimizer.param_groups for p in g["params"]]
        change(step, model, optimizer, shards)
        optimizer.step()
        if step % 5 == 4:
            ds_zero.get_full(model, name, "exp_avg")
        if step % 10 == 7:
            saved = Memory(everyones(ds_zero.records(model, optimizer)))
        if step % 10 == 9:
            ds_zero.load_records(model, optimizer, saved)
        if step % 4 != 3:  # else the next backward adds to it
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    values = [ds_zero.get_full(model, n, k) for n, _ in model.named_parameters() for k in ("param", *ADAM)]
    ds_zero.destroy(model)
    return [v for v in values if v is not None]


def change(step: int, model: nn.Module, optimizer: Optimizer, shards: list[Tensor]) -> None:
    """What user code may do between a backward and the step."""
    name, param = list(model.named_parameters())[1]
    match step:
        case 2:
            for shard in shards:
                if shard.grad is not None:
                    shard.grad.mul_(0.5)
        case 3:
            for shard in shards:
                if shard.grad is not None:
                    shard.grad = shard.grad * 2
        case 5:
            ds_zero.set_full(model, name, "param", torch.full(param.shape, 0.25))
        case 6:
            ds_zero.set_full(model, name, "exp_avg", torch.zeros(param.shape))
        case 8:
            own = ds_zero.local_range(model, name)[1]
            ds_zero.set_local(model, name, "grad", torch.full((own,), 0.125))
        case 11:
            with ds_zero.gathered(model, write=True):
                param.data.mul_(0.5)
        case 12:
            ds_zero.update_full_grads(model, [name], lambda grad, _: grad * 0.5)
        case 14:
            away = ds_zero.Away(model)
            away.back()
        case 15:
            optimizer.load_state_dict(optimizer.state_dict())
        case 17:
            optimizer.zero_grad()
        case 18:
            for shard in shards:
                for value in optimizer.state[shard].values() if shard.numel() else ():
                    value.mul_(1.0)


@ranks(2)
@pytest.mark.parametrize("name", ["0-fused", "1-fused", "1-torch-bf16", "2-host", "3-torch", "3-fused"])
@pytest.mark.filterwarnings("ignore:the gradients of the previous step")
def test_no_false_alarm_and_the_same_bits(name: str) -> None:
    accumulation = "sharded" if name in ("0-fused", "1-fused", "2-host", "3-torch") else "local"
    setup = replace(SETUPS[name], accumulation=accumulation)
    plain = busy_training(setup, checksums=False)
    assert all(map(torch.equal, plain, busy_training(setup, checksums=True)))


@ranks(2)
def test_a_write_to_a_parameter_by_torch_is_legal() -> None:
    model, optimizer = SETUPS["0-fused"].shard()
    for step in range(4):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.5, 0.5)


@ranks(2)
@pytest.mark.parametrize("overlap", [False, True])
def test_overflow_in_fp16(overlap: bool) -> None:
    """Steps that are skipped, and gradients that are infinite, are no corruption."""
    torch.manual_seed(0)
    model = nn.Linear(40, 40)
    optimizer = ds_core.optim.FusedAdam(model.parameters(), lr=0.01)
    config = ds_zero.ZeroConfig(checksums=True, param_dtype=torch.float16, overlap_publish=overlap)
    ds_zero.shard(model, optimizer, 2, config=config)
    scaler = ds_zero.LossScaler(model, ds_zero.DynamicScale(hysteresis=1, window=3))
    skipped = 0
    for step in range(12):
        scaled = scaler.scale(model(torch.full((2, 40), 1.0 if step % 5 else 6e4).half()).float().sum())
        scaled.backward()
        before = scaler.scale(torch.ones(()))
        optimizer.step()
        optimizer.zero_grad()
        skipped += bool(scaler.scale(torch.ones(())) < before)
    ds_zero.destroy(model)  # waits for the messages of the last step, which must not outlive the model
    assert 0 < skipped < 12


def test_values_that_are_away_are_refused() -> None:
    model = nn.Linear(4, 4)
    optimizer = CPUAdam(model.parameters())
    with pytest.raises(ValueError, match=r"checksums=True.*'weight' away.*HostStore"):
        ds_zero.shard(model, optimizer, 1, config=ds_zero.ZeroConfig(checksums=True), store=DistantStore())


def test_states_that_are_away_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    store = NVMeStore(tmp_path, host=("master", "grad", "param"))
    optimizer = PagedOptimizer(CPUAdam(model.parameters()), store)
    with pytest.raises(ValueError, match=r"checksums=True.*PagedOptimizer keeps its states away"):
        ds_zero.shard(model, optimizer, 1, config=ds_zero.ZeroConfig(checksums=True), store=HostStore())
    optimizer.close()


def test_off_by_default() -> None:
    model = nn.Linear(80, 80)
    optimizer = ds_core.optim.FusedAdam(model.parameters())
    ds_zero.shard(model, optimizer, 1)
    for _ in range(2):
        model(torch.ones(2, 80)).sum().backward()
        flip(optimizer.param_groups[0]["params"][0], 0, 3)
        optimizer.step()
        optimizer.zero_grad()


def test_optimizers_made_after_the_model() -> None:
    model = nn.Linear(80, 80)
    ds_zero.shard(model, stage=1, config=ds_zero.ZeroConfig(checksums=True))
    optimizer = ds_zero.shard_optimizer(model, ds_core.optim.FusedAdam(model.parameters()))
    model(torch.ones(2, 80)).sum().backward()
    flip(optimizer.param_groups[0]["params"][0], 70, 3)
    with pytest.raises(ds_zero.ChecksumError, match="on rank 0, master of 'weight', elements 0 to 4095"):
        optimizer.step()
