"""Pipeline x data (ZeRO) x tensor: the training of one process, the same values where ranks share them, checkpoints."""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ds_engine
import ds_zero
from ds_engine.config import ConfigError
from ds_layers.tensor import cut_of
from ds_pipe.model import LayerSpec, PipelineModule, PipeModelDataParallelTopology, TiedLayerSpec, split
from ds_pipe.model.topology import lines
from engine.jobs import on_ranks
from engine.pipeline.test_training import COUNT, config, trained
from harness import ranks
from layers.tensor.test_parallelize import hugging_face
from pipe.executor.models import Block, loss_fn
from pipe.model.test_pipeline import VOCAB, WIDTH, head, items, module, parameters_of, whole

CLIP = 0.5
PLAN = {
    "autotp_size": 2,
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": [r"\d+\.up\.weight"], "partition_type": "column"},
            {"patterns": [r"\d+\.down\.weight"], "partition_type": "row"},
        ],
    },
}
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "foreach": True}}


def alone(
    steps: int, data_ranks: int, tied: bool, dtype: torch.dtype
) -> tuple[list[float], dict[str, Tensor]]:
    """One process: losses, and weights after `steps`."""
    layers = [layer.to(dtype) if isinstance(layer, nn.Module) else layer for layer in whole(tied)]
    params = parameters_of(layers)
    optimizer = torch.optim.SGD(params.values(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        total = torch.zeros((), dtype=dtype)
        for rank in range(data_ranks):
            for x, y in items(step, rank, COUNT):
                for layer in layers:
                    x = layer(x)
                loss = loss_fn(x, y) / (COUNT * data_ranks)
                loss.backward()
                total += loss.detach()
        nn.utils.clip_grad_norm_(params.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses, {name: p.detach() for name, p in params.items()}


def parts_of(engine: ds_engine.Engine) -> dict[str, Tensor]:
    """This rank's parameters, gathered over data-parallel ranks."""
    with ds_zero.gathered(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def is_as_alone(engine: ds_engine.Engine, losses: list[float], steps: int, tied: bool) -> None:
    """Within 4 times the rounding of plain PyTorch: the difference of its training in fp32 from that in fp64."""
    data_ranks = engine.topology.data.size
    single, weights = alone(steps, data_ranks, tied, torch.float32)
    double, exact = alone(steps, data_ranks, tied, torch.float64)
    rounding = max(abs(a - b) for a, b in zip(single, double, strict=True))
    assert max(abs(a - b) for a, b in zip(losses, single, strict=True)) <= 4 * max(rounding, 1e-7)
    off = {name: (w.double() - exact[name]).abs().max().item() for name, w in weights.items()}
    usual = statistics.median(off.values())
    renamed = {"tied_modules.embedding.weight": "0.weight"}
    params = dict(engine.module.named_parameters())
    for name, value in parts_of(engine).items():
        cut, want = cut_of(name, params[name]), weights[renamed.get(name, name)]
        want = want if cut is None else cut.of(want)
        error = (value - want).abs().max().item()
        assert error <= 4 * max(off[renamed.get(name, name)], usual), f"{name}: {error}"


def is_same_everywhere(engine: ds_engine.Engine) -> int:
    """Whole parameters are equal on all ranks that have them, parts on those of one tensor-parallel coordinate.
    Returns how many whole parameters this rank has."""
    at, params = engine.topology.tensor.index, dict(engine.module.named_parameters())
    mine = {
        (name, None if cut_of(name, params[name]) is None else at): value
        for name, value in parts_of(engine).items()
    }
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    for rank, theirs in enumerate(every):
        for key in mine.keys() & theirs.keys():
            assert torch.equal(mine[key], theirs[key]), f"{key} differs on rank {rank}"
    return sum(part is None for _, part in mine)


@ranks(8, groups_may_stay=True, timeout_s=240)
def test_two_by_two_by_two_ranks_train_as_one_process() -> None:
    compare(((0, False, "zb-v"), (3, True, "1f1b")))


@pytest.mark.full
@ranks(8, groups_may_stay=True, timeout_s=600)
def test_every_stage_and_schedule() -> None:
    compare(itertools.product((0, 1, 2, 3), (False, True), ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")))


def compare(cases: Iterable[tuple[int, bool, str]]) -> None:
    for stage, tied, schedule in cases:
        built = module(2, tied, schedule=schedule)
        engine, *_ = ds_engine.initialize(built, config(stage, CLIP, tensor_parallel=PLAN))
        assert engine.topology.sizes() == {"pipe": 2, "data": 2, "tensor": 2}
        losses = trained(engine, 4)
        is_as_alone(engine, losses, 4, tied)
        if (stage, tied, schedule) == (3, True, "1f1b"):
            trained(engine, 16, first=4)
            assert is_same_everywhere(engine) > 8
            norms: list[Any] = [None] * 8
            dist.all_gather_object(norms, engine.get_global_grad_norm())
            assert len(set(norms)) == 1
        engine.destroy()


class Mpu:
    """Megatron's methods over the order (pipe, data, tensor), tensor fastest; `swapped`: data fastest."""

    def __init__(self, *, swapped: bool = False) -> None:
        names = ("pipe", "tensor", "data") if swapped else ("pipe", "data", "tensor")
        world = dist.get_world_size()
        self._mesh = init_device_mesh(
            "cpu", (2, 2, world // 4) if swapped else (2, world // 4, 2), mesh_dim_names=names
        )

    def get_data_parallel_group(self) -> Any:
        return self._mesh["data"].get_group()

    def get_tensor_model_parallel_group(self) -> Any:
        return self._mesh["tensor"].get_group()

    def get_pipeline_model_parallel_group(self) -> Any:
        return self._mesh["pipe"].get_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        return 2

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh["tensor"].get_local_rank()


class Summed(torch.autograd.Function):
    """Megatron's reduce from the tensor-parallel region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Copied(torch.autograd.Function):
    """Megatron's copy to the tensor-parallel region."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class MegatronBlock(Block):
    """`Block` of which each tensor-parallel rank has half of the inner features."""

    def __init__(self, width: int, mpu: Mpu) -> None:
        super().__init__(width)
        self.group = mpu.get_tensor_model_parallel_group()
        half = slice(
            mpu.get_tensor_model_parallel_rank() * width, (mpu.get_tensor_model_parallel_rank() + 1) * width
        )
        for layer, name, of in (
            (self.up, "weight", lambda w: w[half]),
            (self.up, "bias", lambda w: w[half]),
            (self.down, "weight", lambda w: w[:, half]),
        ):
            part = nn.Parameter(of(getattr(layer, name).detach()).clone())
            part.tensor_model_parallel = True  # type: ignore[attr-defined]
            setattr(layer, name, part)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.gelu(self.up(Copied.apply(self.norm(x), self.group)))
        return x + Summed.apply(self.down(inner), self.group)


def cut_by_dtensor(width: int, mesh: Any) -> nn.Module:
    return parallelize_module(Block(width), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def with_blocks(make: Any, **options: Any) -> PipelineModule:
    body = [LayerSpec(make) for _ in range(8)]
    first = TiedLayerSpec("embedding", nn.Embedding, VOCAB, WIDTH)
    last = TiedLayerSpec("embedding", nn.Embedding, VOCAB, WIDTH, forward_fn=head)
    return PipelineModule(
        [first, *body, LayerSpec(nn.LayerNorm, WIDTH), last], 2, loss_fn=loss_fn, seed_layers=True, **options
    )


def weights_are(engine: ds_engine.Engine, want: dict[str, Tensor], at: int) -> None:
    for name, value in parts_of(engine).items():
        full = want["0.weight" if name.startswith("tied") else name]
        dim = 1 if ".down." in name else 0
        full = full if value.shape == full.shape else full.chunk(2, dim)[at]
        torch.testing.assert_close(value, full, rtol=1e-4, atol=1e-6)


@ranks(4, groups_may_stay=True, timeout_s=120)
def test_layers_of_an_mpu_and_dtensors(tmp_path: Any) -> None:
    single, weights = alone(4, 1, True, torch.float32)
    mpu = Mpu()
    mesh = mpu._mesh["tensor"]
    for stage, built, given in (
        (2, with_blocks(partial(MegatronBlock, WIDTH, mpu)), mpu),
        (3, with_blocks(partial(cut_by_dtensor, WIDTH, mesh)), None),
    ):
        engine, *_ = ds_engine.initialize(built, config(stage, CLIP), mpu=given)
        assert engine.topology.sizes() == {"pipe": 2, "tensor": 2}
        assert engine.topology.logical == (given is None)
        assert trained(engine, 4) == pytest.approx(single, rel=1e-5)
        weights_are(engine, weights, engine.topology.tensor.index)
        folder = tmp_path / str(stage)
        engine.save_checkpoint(folder)
        expected = trained(engine, 2, first=4)
        engine.destroy()
        make = partial(MegatronBlock, WIDTH, mpu) if given else partial(cut_by_dtensor, WIDTH, mesh)
        again, *_ = ds_engine.initialize(with_blocks(make), config(stage, CLIP), mpu=given)
        again.load_checkpoint(folder)
        assert trained(again, 2, first=4) == expected
        again.destroy()
    built = with_blocks(partial(MegatronBlock, WIDTH, mpu))
    with pytest.raises(
        ConfigError, match="mpu and the PipelineModule divide the ranks differently: rank 0 shares"
    ):
        ds_engine.initialize(built, config(1), mpu=Wrong())


def hugging_face_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@ranks(4, groups_may_stay=True, timeout_s=120)
def test_a_split_model_of_transformers_is_cut_by_the_plan_of_its_family() -> None:
    tokens = [torch.randint(0, 31, (2, 8), generator=torch.Generator().manual_seed(i)) for i in range(COUNT)]
    model = hugging_face("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = []
    for _ in range(3):
        loss = torch.stack([model(input_ids=t, labels=t).loss for t in tokens]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    built = PipelineModule(split(hugging_face("llama")), 2, loss_fn=hugging_face_loss)
    section = {"autotp_size": 2, "vocab_parallel_lm_head": True}
    engine, *_ = ds_engine.initialize(built, config(3, tensor_parallel=section))
    losses = [engine.train_batch((t, t) for t in tokens).item() for _ in range(3)]
    assert losses == pytest.approx(expected, rel=1e-5)
    cut = {n.split(".")[-2] for n, p in built.named_parameters() if cut_of(n, p) is not None}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert cut == projections | ({str(built.parts[-1] - 1)} if engine.is_last_stage() else set())
    engine.destroy()


class Wrong(Mpu):
    def get_pipeline_model_parallel_group(self) -> Any:
        return self._mesh["tensor"].get_group()


def started(num_stages: int, size: int, stage: int) -> ds_engine.Engine:
    world = dist.get_world_size()
    topology = PipeModelDataParallelTopology(num_stages, size, world // (num_stages * size))
    built = (
        module(num_stages, True, topology=topology)
        if num_stages * size < world or size > 1
        else module(num_stages, True)
    )
    more = {"tensor_parallel": {**PLAN, "autotp_size": size}} if size > 1 else {}
    return ds_engine.initialize(built, config(stage, CLIP, optimizer=ADAM, **more))[0]


def same_data(engine: ds_engine.Engine, first: int, last: int) -> list[float]:
    """All data-parallel ranks read the same, so that their number changes nothing."""
    return [engine.train_batch(items(step, 0, COUNT)).item() for step in range(first, last)]  # type: ignore[attr-defined]


def saved(folder: str) -> None:
    engine = started(2, 2, 2)
    same_data(engine, 0, 3)
    engine.save_checkpoint(folder)
    torch.save(same_data(engine, 3, 6), f"{folder}/losses.pt")
    engine.destroy()


def resumed(folder: str, num_stages: int, size: int, stage: int) -> None:
    engine = started(num_stages, size, stage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.load_checkpoint(folder)
    losses, expected = same_data(engine, 3, 6), torch.load(f"{folder}/losses.pt")
    assert losses == (expected if size == 2 and num_stages == 2 else pytest.approx(expected, rel=1e-5))
    engine.destroy()


def test_a_checkpoint_resumes_with_other_sizes_of_every_axis(
    request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    folder = str(tmp_path)
    on_ranks(request, 8, saved, groups_may_stay=True, folder=folder)
    for world, num_stages, size, stage in (
        (8, 2, 2, 3),
        (4, 2, 2, 1),
        (4, 1, 4, 3),
        (2, 2, 1, 2),
        (1, 1, 1, 0),
    ):
        on_ranks(
            request,
            world,
            resumed,
            groups_may_stay=True,
            folder=folder,
            num_stages=num_stages,
            size=size,
            stage=stage,
        )


@ranks(4, groups_may_stay=True, timeout_s=120)
def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    cases = (
        ({"autotp_size": 3}, "do not divide the 2 ranks"),
        ({"autotp_size": 2}, "there is no tensor-parallel plan"),
        ({**PLAN, "sequence_parallel_norms": True}, "sequence_parallel_norms"),
        (
            {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": [
                {"patterns": [r".*embedding\.weight"], "partition_type": "column"}]}},
            "cuts tied layers",
        ),
    )  # fmt: skip
    for section, match in cases:
        with pytest.raises(ConfigError, match=match):
            ds_engine.initialize(module(2, True), config(1, tensor_parallel=section))
    topology = PipeModelDataParallelTopology(1, 4, 1)
    with pytest.raises(ConfigError, match="contradict each other"):
        ds_engine.initialize(module(1, topology=topology), config(1, tensor_parallel=PLAN))
    assert lines(topology, "model") == [[0, 1, 2, 3]]
