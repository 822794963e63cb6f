"""Who decides where a batch ends: the engine (`managed_gradient_accumulation`) or its caller; and what travels then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
import ds_zero
from ds_engine.config import ConfigError, load
from ds_engine.training.accumulation import Accumulation
from ds_zero import _registry
from engine import jobs
from harness import ranks

BATCHES = (1, 3, 2)
"""Micro-batches of each step."""


def micro_batch(step: int, micro: int, rank: int) -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def engine(stage: int, **more: Any) -> ds_engine.Engine:
    config = {"train_micro_batch_size_per_gpu": 2, "startup_summary": False, "gradient_clipping": 0.0}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_optimization": {"stage": stage}}
    made, *_ = ds_engine.initialize(model=net(), config=config | more)
    return made


def plain() -> dict[str, Tensor]:
    """The same by hand, on one process that sees all ranks' micro-batches."""
    model, size = net(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, count in enumerate(BATCHES):
        for micro in range(count):
            for rank in range(size):
                (model(micro_batch(step, micro, rank)).square().mean() / size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_caller_ends_batches_of_any_length(stage: int) -> None:
    with engine(stage, managed_gradient_accumulation=False) as made:
        seen = 0
        for step, count in enumerate(BATCHES):
            for micro in range(count):
                assert not made.is_gradient_accumulation_boundary()
                made.backward(made(micro_batch(step, micro, made.world.rank)).square().mean())
            made.step()
            seen += count
            assert made.was_step_applied()
            assert (made.global_steps, made.micro_steps, made.global_samples) == (step + 1, seen, 4 * seen)
        found = ds_zero.full_state_dict(made.module)
    if dist.get_rank() == 0:
        for name, value in plain().items():
            assert torch.allclose(found[name], value, atol=1e-6), name


@ranks(2)
@pytest.mark.parametrize("stage", [0, 1])
def test_ranks_may_do_different_numbers_of_micro_batches(stage: int) -> None:
    """Nothing is reduced before the step, so no rank waits for a backward that another one does not do."""
    with engine(stage, managed_gradient_accumulation=False) as made:
        for step in range(3):
            for micro in range(1 + (step + made.world.rank) % 2):
                made.backward(made(micro_batch(step, micro, made.world.rank)).square().mean())
            made.step()
        assert made.global_steps == 3


def test_losses_are_still_divided_and_can_be_left_alone() -> None:
    with engine(0, managed_gradient_accumulation=False, gradient_accumulation_steps=4) as made:
        loss = made(micro_batch(0, 0, 0)).square().mean()
        assert made.backward(loss).item() == pytest.approx(loss.item() / 4)
        loss = made(micro_batch(0, 0, 0)).square().mean()
        assert made.backward(loss, scale_wrt_gas=False).item() == pytest.approx(loss.item())
        made.step()
        assert made.global_steps == 1


def test_a_checkpoint_inside_a_batch_says_so(tmp_path: Path) -> None:
    with engine(0, managed_gradient_accumulation=False) as made:
        made.backward(made(micro_batch(0, 0, 0)).square().mean())
        with pytest.warns(UserWarning, match="saved after 1 of some micro-batches"):
            made.save_checkpoint(tmp_path)
        made.step()
        made.save_checkpoint(tmp_path)


def test_the_engine_counts_unless_it_is_told() -> None:
    counting = Accumulation(steps=2)
    found = []
    for forced in (None, None, None, True, None):
        counting.forced = forced
        counting.note_backward()
        with counting.ending() as boundary:
            found.append(boundary)
    assert found == [False, True, False, True, False] and counting.pending == 1


def test_a_step_without_a_backward_is_refused_and_changes_nothing() -> None:
    engine = jobs.engine(1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"there was no engine\.backward\(loss\) before it"):
            engine.step()
    assert engine.micro_steps == engine.global_steps == 0
    jobs.train(engine, 1)
    assert engine.global_steps == 1
    with pytest.raises(RuntimeError, match="no engine"):
        engine.step()
    engine.destroy()


@ranks(2)
@pytest.mark.parametrize("stage", [0, 2])
def test_a_plain_backward_is_refused_by_the_step_on_every_rank(stage: int) -> None:
    """It is not divided by the micro-batches of a step, so it would train at another rate."""
    engine = jobs.engine(stage)
    loss = jobs.loss_of(engine, *jobs.micro_batches(engine, 1)[0])
    loss.backward()
    with pytest.raises(RuntimeError, match=r"divides the loss by gradient_accumulation_steps \(2\)"):
        engine.step()
    engine.destroy()


@ranks(2)
def test_a_backward_of_the_scaled_loss_trains_as_the_engines_own() -> None:
    losses = []
    for own in (True, False):
        engine = jobs.engine(2)
        told = []
        for batch in jobs.micro_batches(engine, 3):
            loss = jobs.loss_of(engine, *batch)
            told.append(loss.item())
            if own:
                engine.backward(loss)
            else:
                engine.scale(loss).backward()
            engine.step()
        losses.append(told)
        engine.destroy()
    assert losses[0] == losses[1]


# --- sparse_gradients


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(997, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens)).square().mean()  # type: ignore[no-any-return]


@ranks(2)
def test_sparse_gradients_send_less_and_train_the_same() -> None:
    found, sent = [], []
    for sparse in (False, True):
        torch.manual_seed(0)
        config = {"train_batch_size": 8, "gradient_accumulation_steps": 2, "startup_summary": False}
        config |= {"sparse_gradients": sparse, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}
        made, *_ = ds_engine.initialize(model=Words(), config=config)
        with made:
            for micro in range(6):
                generator = torch.Generator().manual_seed(10 * micro + made.world.rank)
                made.backward(made(torch.randint(0, 997, (2, 5), generator=generator)))
                made.step()
            comm = _registry.state_of(made.module).comm
            sent.append(comm.gathered_bytes + comm.reduced_bytes)
            found.append({name: p.detach().clone() for name, p in made.module.named_parameters()})
    assert sent[1] < sent[0] / 4, sent
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sparse_gradients_need_stage_0(stage: int) -> None:
    config = {"train_batch_size": 8, "sparse_gradients": True, "zero_optimization": {"stage": stage}}
    with pytest.raises(ConfigError, match=r"sparse_gradients needs zero_optimization\.stage 0"):
        load(config)
