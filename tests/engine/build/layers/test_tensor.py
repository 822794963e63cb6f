"""The section `tensor_parallel`: the training of one process, at every stage, and checkpoints of whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
import ds_zero
from ds_engine.build.topology import arranged
from ds_engine.config import ConfigError, load
from ds_layers.tensor import cut_of
from engine.jobs import on_ranks
from harness import ranks
from layers.tensor.test_parallelize import hugging_face

STEPS = 3


def batch(step: int, index: int) -> Tensor:
    return torch.randint(0, 31, (2, 8), generator=torch.Generator().manual_seed(10 * step + index))


def config(stage: int, size: int, **more: Any) -> dict[str, Any]:
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": size, **more},
        "seed": 5,
        "startup_summary": False,
    }


def reference(kind: str, steps: int) -> list[float]:
    model = hugging_face(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        loss = torch.stack(
            [model(input_ids=b, labels=b).loss for b in (batch(step, 0), batch(step, 1))]
        ).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train(engine: ds_engine.Engine, first: int, last: int) -> list[float]:
    losses = []
    samples = engine.topology.samples
    for step in range(first, last):
        own = range(samples.index, 2, samples.size)
        total = 0.0
        for index in own:
            loss = engine(input_ids=batch(step, index), labels=batch(step, index)).loss
            engine.backward(loss)
            engine.step()
            total += loss.item() / len(own)
        mean = torch.tensor(total)
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def state_of(engine: ds_engine.Engine) -> dict[tuple[str, str], Tensor]:
    """Whole tensors and optimizer states, put together from the records of all ranks."""
    own = [
        (r.fqn, r.state, r.global_shape, r.flat_offset, r.data.clone())  # type: ignore[union-attr]
        for r in ds_zero.records(engine.module, engine.optimizer)
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    whole: dict[tuple[str, str], Tensor] = {}
    for name, state, shape, start, data in (record for records in everyone for record in records):
        flat = whole.setdefault((name, state), torch.full((torch.Size(shape).numel(),), torch.nan))
        assert flat[start : start + data.numel()].isnan().all(), f"{state} of {name} was written twice"
        flat[start : start + data.numel()] = data.float()
    assert not any(flat.isnan().any() for flat in whole.values())
    return whole


@ranks(4, groups_may_stay=True)
def test_two_by_two_ranks_train_as_one_process() -> None:
    losses = {kind: reference(kind, STEPS) for kind in ("llama", "gpt2")}
    for stage, kind, more in (
        (0, "gpt2", {"vocab_parallel_lm_head": True}),
        (1, "llama", {"sequence_parallel_norms": True}),
        (2, "gpt2", {}),
        (3, "llama", {}),
    ):
        engine, *_ = ds_engine.initialize(model=hugging_face(kind), config=config(stage, 2, **more))
        topology = engine.topology
        assert (topology.data.size, topology.tensor.size, topology.tensor.index) == (
            2,
            2,
            dist.get_rank() % 2,
        )
        assert train(engine, 0, STEPS) == pytest.approx(losses[kind], rel=2e-4), f"{kind} at stage {stage}"
        engine.destroy()


@ranks(4, groups_may_stay=True)
def test_after_twenty_steps_all_ranks_have_the_same_replicated_parameters() -> None:
    engine, *_ = ds_engine.initialize(
        model=hugging_face("llama"), config=config(3, 2, sequence_parallel_norms=True)
    )
    train(engine, 0, 20)
    engine.destroy()
    replicated = 0
    for name, param in engine.module.named_parameters():
        whole = cut_of(name, param) is None
        values: list[Any] = [None] * 4
        dist.all_gather_object(values, param.detach())  # parts may differ in size
        replicated += whole
        for rank, value in enumerate(values):
            if whole or rank % 2 == dist.get_rank() % 2:
                assert torch.equal(value, param), f"{name} differs on rank {rank}"
    assert replicated == 5  # two norms in each of two layers, and the last one


def save_run(folder: Path, size: int) -> None:
    engine, *_ = ds_engine.initialize(model=hugging_face("gpt2"), config=config(2, size))
    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    whole = state_of(engine)
    values = ds_zero.full_state_dict(engine.module)
    assert len(values) == len(model_names(engine)) * (dist.get_rank() == 0)
    for name, value in values.items():
        name = "transformer.wte.weight" if name == "lm_head.weight" else name  # tied
        assert torch.equal(value.flatten(), whole[name, "param"])
    everywhere: list[Any] = [values]
    dist.broadcast_object_list(everywhere, 0)
    ds_zero.load_full_state_dict(engine.module, everywhere[0])
    if dist.get_rank() == 0:
        assert values
        torch.save({"whole": whole, "losses": train_losses(engine)}, folder / "expected.pt")
    else:
        train_losses(engine)


def model_names(engine: ds_engine.Engine) -> set[str]:
    return set(engine.module.state_dict(keep_vars=True))


def train_losses(engine: ds_engine.Engine) -> list[float]:
    return train(engine, 2, 4)


def resume_run(folder: Path, size: int) -> None:
    model = hugging_face("gpt2")
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    engine, *_ = ds_engine.initialize(model=model, config=config(3, size))
    engine.load_checkpoint(folder)
    expected = torch.load(folder / "expected.pt")
    whole = state_of(engine)
    assert whole.keys() == expected["whole"].keys()
    for key, value in whole.items():
        assert torch.equal(value, expected["whole"][key]), key
    assert train(engine, 2, 4) == pytest.approx(expected["losses"], rel=1e-4)


def test_a_checkpoint_of_two_parts_resumes_whole_and_in_other_parts(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    on_ranks(request, 4, save_run, groups_may_stay=True, folder=tmp_path, size=2)
    on_ranks(request, 2, resume_run, groups_may_stay=True, folder=tmp_path, size=1)
    on_ranks(request, 4, resume_run, groups_may_stay=True, folder=tmp_path, size=4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks that share a layer do not divide 4 ranks"):
        arranged(load(config(1, 3)), 0, 4)
    settings = load({**config(1, 2), "sequence_parallel_size": 2})
    topology = arranged(settings, 5, 8)
    assert topology.sizes() == {"data": 2, "sequence": 2, "tensor": 2}
    assert (topology.data.index, topology.sequence.index, topology.tensor.index) == (1, 0, 1)
    assert topology.seed_offset(5) == 2
