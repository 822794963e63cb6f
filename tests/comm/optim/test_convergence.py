"""Training with compressed communication ends where training without it does; without error feedback it does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ds_comm.compress import TopKCompressor
from ds_comm.exchange import QuantizedAllGather, QuantizedReduceScatter
from ds_comm.optim import (
    CompressionOptions,
    LocalSGD,
    OneBitAdam,
    OneBitLamb,
    SelfReducingOptimizer,
    ShardedOneBitAdam,
    ZeroOneAdam,
    nesterov,
)
from harness import ranks

VOCABULARY, CONTEXT, BATCH = 64, 3, 32
Make = Callable[[list[nn.Parameter], int], SelfReducingOptimizer]


class Model(nn.Module):
    """Predicts the next symbol from the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.hidden = nn.Sequential(nn.Linear(32 * CONTEXT, 128), nn.GELU(), nn.LayerNorm(128))
        self.head = nn.Linear(128, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(x).flatten(1)))


def _text(numel: int) -> Tensor:
    """Symbols of which each depends on the last two: a few likely successors for each pair, frequent and rare pairs."""
    generator = torch.Generator().manual_seed(1)
    successors = (torch.rand(VOCABULARY, VOCABULARY, 4, generator=generator).square() * VOCABULARY).long()
    choices = torch.multinomial(
        torch.tensor([0.6, 0.25, 0.1, 0.05]), numel, replacement=True, generator=generator
    )
    noise = torch.rand(numel, generator=generator) < 0.05
    table, text, a, b = successors.tolist(), [], 0, 1
    for choice, random in zip(choices.tolist(), noise.tolist(), strict=True):
        a, b = b, (choice * 17 + b) % VOCABULARY if random else table[a][b][choice]
        text.append(b)
    return torch.tensor(text)


def _windows(text: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    return text[places[:, None] + torch.arange(CONTEXT)], text[places + CONTEXT]


def _trained(
    steps: int, seed: int, lr: float, make: Callable[[nn.Module], torch.optim.Optimizer], forget: bool = False
) -> float:
    """The loss on symbols that were not seen in training."""
    text = _text(40_000)
    train, held_out = text[:32_000], text[32_000:]
    torch.manual_seed(seed)
    model = Model()
    optimizer = make(model)
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
            )
        x, y = _windows(train, torch.randint(0, len(train) - CONTEXT, (BATCH,), generator=generator))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if forget and isinstance(optimizer, OneBitAdam) and optimizer.compressed_state.feedback is not None:
            optimizer.compressed_state.feedback.clear()
    with torch.no_grad():
        x, y = _windows(held_out, torch.arange(len(held_out) - CONTEXT))
        return nn.functional.cross_entropy(model(x), y).item()


def _adam(**options: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: OneBitAdam(model.parameters(), **options)


def _lamb(**options: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: OneBitLamb(model.parameters(), weight_decay=0.01, **options)


def _zero_one(steps: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: ZeroOneAdam(
        model.parameters(),
        var_freeze_step=steps // 2,
        var_update_scaler=steps // 20,
        local_step_scaler=steps // 8,
        local_step_clipper=4,
    )


def _local(steps: int, sparse: bool = False) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """An outer step every 10 steps; sparse: with an eighth of the elements, which is a sixteenth of the bits."""
    options = CompressionOptions(compressor=TopKCompressor(block_numel=512, kept=64)) if sparse else None
    return lambda model: LocalSGD(
        torch.optim.AdamW(model.parameters(), weight_decay=0.0),
        nesterov(0.7, 0.6),
        10,
        start_step=steps // 10,
        compression=options,
    )


def _sharded(quantised: bool) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (model.embedding, model.hidden, model.head, model):
            fully_shard(module, mesh=mesh)
        for module in model.modules():
            if quantised and isinstance(module, FSDPModule):
                module.set_custom_all_gather(QuantizedAllGather())  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(QuantizedReduceScatter())  # type: ignore[arg-type]
        return torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    return make


def _check(steps: int, seed: int, limit: float) -> None:
    dense = _trained(steps, seed, 3e-3, _adam(freeze_step=steps))
    assert dense < 0.8 * math.log(VOCABULARY)  # it has learned something
    freeze = steps // 5
    onebit = _trained(steps, seed, 3e-3, _adam(freeze_step=freeze))
    zero_one = _trained(steps, seed, 3e-3, _zero_one(steps))
    without = _trained(steps, seed, 3e-3, _adam(freeze_step=freeze), forget=True)
    dense_lamb = _trained(steps, seed, 1e-2, _lamb(freeze_step=steps))
    lamb = _trained(steps, seed, 1e-2, _lamb(freeze_step=steps // 4))  # trust ratios need longer to settle
    sharded = _trained(steps, seed, 3e-3, _sharded(quantised=False))
    quantised = _trained(steps, seed, 3e-3, _sharded(quantised=True))
    divided = _trained(
        steps, seed, 3e-3, lambda model: ShardedOneBitAdam(model.parameters(), freeze_step=freeze)
    )
    local = _trained(steps, seed, 3e-3, _local(steps))
    sparse = _trained(steps, seed, 3e-3, _local(steps, sparse=True))
    print(
        f"seed {seed}: Adam {dense:.4f}, 1-bit {onebit:.4f}, 1-bit with stage 1 {divided:.4f}, 0/1 {zero_one:.4f}, "
        f"without feedback {without:.4f}; LAMB {dense_lamb:.4f}, 1-bit {lamb:.4f}; sharded {sharded:.4f}, "
        f"quantised {quantised:.4f}; local {local:.4f}, sparse {sparse:.4f}"
    )
    assert onebit < (1 + limit) * dense
    assert divided < (1 + limit) * dense
    assert zero_one < (1 + limit) * dense
    assert lamb < (1 + limit) * dense_lamb
    assert quantised < (1 + limit) * sharded
    assert local < (1 + 2 * limit) * dense
    assert sparse < (1 + 2 * limit) * dense
    assert without > (1 + limit) * dense


@ranks(2, timeout_s=240, groups_may_stay=True)
def test_a_short_run() -> None:
    _check(300, 0, 0.01)


@pytest.mark.full
@ranks(2, timeout_s=1200, groups_may_stay=True)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_thousand_steps(seed: int) -> None:
    _check(1000, seed, 0.01)
