"""What the engine expects of those who answer for gradients and state, run against every implementation: ds_zero, a
plain torch optimizer whose gradients are averaged when their norm is asked for, and one that averages inside of its
step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
from ds_engine.build import ranks as running
from ds_engine.build import zero
from ds_engine.build.topology import Meshes, arranged
from ds_engine.config import load
from ds_engine.engine import Engine, Parts, Training
from ds_engine.interfaces import ReducesGradients, Roles, StateNames
from ds_engine.job import Job, choices_of, describe
from ds_engine.training.monitor import Monitor
from ds_engine.training.pacing import Pacing
from ds_engine.training.progress import Progress
from ds_engine.training.reporting import Reporting
from ds_engine.training.timing import Breakdown
from harness import ranks

STEPS, MICRO_BATCHES = 3, 2


@dataclass(frozen=True)
class Piece:
    fqn: str
    state: str
    global_shape: tuple[int, ...]
    flat_offset: int
    data: Tensor
    coordinates: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    before: float
    after: float


@dataclass(frozen=True)
class Counted:
    accumulation: str
    params_numel: int
    trainable_numel: int
    owned_numel: int
    compute_dtypes: tuple[str, ...] = ("torch.float32",)


@dataclass(frozen=True)
class Bytes:
    params_bytes: int
    masters_bytes: int = 0
    grads_bytes: int = 0
    optimizer_bytes: int = 0


class PlainNorms:
    """Averages the gradients over ranks, where the optimizer does not, and clips them as torch does."""

    def __init__(self, model: nn.Module, average: bool) -> None:
        self._model, self._average = model, average
        self._last: Measured | None = None

    def clip(self, max_norm: float) -> None:
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        for grad in grads if self._average else ():
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), max_norm))
        self._last = Measured(norm, min(norm, max_norm))

    def last(self) -> Measured | None:
        return self._last


class PlainState:
    """Every rank holds all; the first one writes it."""

    divided = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.destroyed = 0

    def _pieces(self) -> list[Piece]:
        pieces = []
        for name, param in self._model.named_parameters():
            states = {k: v for k, v in self._optimizer.state.get(param, {}).items() if v.shape == param.shape}
            for state, value in {"param": param.detach(), **states}.items():
                pieces.append(Piece(name, state, tuple(param.shape), 0, value.reshape(-1)))
        return pieces

    def records(self) -> Sequence[Piece]:
        return self._pieces() if dist.get_rank() == 0 else []

    def group_names(self) -> list[list[str]]:
        names = {id(p): n for n, p in self._model.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self._optimizer.param_groups]

    def names(self) -> StateNames:
        params = dict(self._model.named_parameters())
        return StateNames(
            tensors=frozenset({*params, *(name for name, _ in self._model.named_buffers())}),
            frozen=tuple(name for name, p in params.items() if not p.requires_grad),
            tied={},
            groups=tuple(tuple(names) for names in self.group_names()),
        )

    def load_records(self, source: Any, *, optimizer_states: bool = True, **_: Any) -> None:
        for name, param in self._model.named_parameters():
            for state in source.states(name, {}):
                if state != "param":
                    if not optimizer_states:
                        continue
                    self._optimizer.state[param].setdefault(state, torch.zeros_like(param))
            for piece in self._pieces():
                if piece.fqn == name:
                    source.read(name, piece.state, 0, piece.data)

    @property
    def backwards(self) -> int:
        return 0  # it does not count

    def shares(self) -> Counted:
        numel = sum(p.numel() for p in self._model.parameters())
        return Counted("local", numel, numel, numel)

    def held(self) -> Bytes:
        return Bytes(sum(p.nbytes for p in self._model.parameters()))

    def residuals(self) -> Mapping[str, Any] | None:
        return None

    def load_residuals(self, states: Sequence[Mapping[str, Any]]) -> str | None:
        return None

    def offload(self, include: Collection[str] | None, device: str, **_: Any) -> None:
        raise ValueError("plain state stays where it is")

    def reload(self, *, non_blocking: bool) -> None:
        """Nothing is away."""

    def offloaded(self) -> frozenset[str]:
        return frozenset()

    def destroy(self) -> None:
        self.destroyed += 1


class AveragingSGD(torch.optim.SGD):
    """Averages gradients over ranks inside of `step`."""

    reduces_gradients = True

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                dist.all_reduce(param.grad)
                param.grad /= dist.get_world_size()
        return super().step(closure)


def with_ds_zero(job: Job, model: nn.Module) -> tuple[torch.optim.Optimizer, Roles]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    zero.shard(job, model, optimizer, Meshes(), torch.device("cpu"))
    state = zero.ZeroState(model, optimizer)
    return optimizer, Roles(guard=zero.guard_of(job, model), norms=zero.ZeroNorms(model), state=state)


def plain(job: Job, model: nn.Module) -> tuple[torch.optim.Optimizer, Roles]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    norms = PlainNorms(model, average=True)
    return optimizer, Roles(guard=zero.Unguarded(), norms=norms, state=PlainState(model, optimizer))


def averaging(job: Job, model: nn.Module) -> tuple[torch.optim.Optimizer, Roles]:
    optimizer = AveragingSGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    assert isinstance(optimizer, ReducesGradients)
    norms = PlainNorms(model, average=False)
    return optimizer, Roles(guard=zero.Unguarded(), norms=norms, state=PlainState(model, optimizer))


IMPLEMENTATIONS: dict[str, Callable[[Job, nn.Module], tuple[torch.optim.Optimizer, Roles]]] = {
    "ds_zero": with_ds_zero,
    "plain": plain,
    "averaging": averaging,
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


def start(name: str, clip: float = 0.0) -> Engine:
    world = running.start()
    settings = load(
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": 2},
        }
    )
    job = describe(choices_of(settings), arranged(settings, world.rank, world.world_size), "cpu")
    model = net()
    optimizer, roles = IMPLEMENTATIONS[name](job, model)
    breakdown = Breakdown(time_on=False, memory_on=False, device=world.device, every=0, write=lambda _: None)
    return Engine(
        Parts(
            job=job,
            world=world,
            training=Training(module=model, optimizer=optimizer, schedule=None),
            roles=roles,
            pacing=Pacing(settings),
            reporting=Reporting(progress=Progress(0, world.rank), monitor=Monitor(), breakdown=breakdown),
        )
    )


def inputs(step: int, micro: int, rank: int) -> Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))


def train(engine: Engine, first: int = 0, last: int = STEPS) -> list[float]:
    norms = []
    for step in range(first, last):
        for micro in range(MICRO_BATCHES):
            engine.backward(engine(inputs(step, micro, engine.world.rank)).square().mean())
            engine.step()
        norms.append(engine.get_global_grad_norm() or 0.0)
    return norms


def expected(clip: float = 0.0) -> tuple[list[Tensor], list[float]]:
    """One process that sees the samples of all ranks."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(MICRO_BATCHES):
            for rank in range(2):
                (model(inputs(step, micro, rank)).square().mean() / (2 * MICRO_BATCHES)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))))
        optimizer.step()
    return [p.detach() for p in model.parameters()], norms


def same(engine: Engine, wanted: list[Tensor]) -> None:
    for param, value in zip(engine.module.parameters(), wanted, strict=True):
        torch.testing.assert_close(param.detach(), value)


@ranks(2)
@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
def test_they_train_alike_and_go_away(name: str) -> None:
    engine = start(name)
    assert engine.get_global_grad_norm() is None
    norms = train(engine)
    wanted, true_norms = expected()
    if name != "averaging":  # which has no average yet when it is asked
        assert norms == pytest.approx(true_norms, rel=1e-5)
    assert engine.was_step_applied() and engine.global_steps == STEPS
    assert engine.model_state.shares().params_numel == sum(p.numel() for p in net().parameters())
    assert engine.model_state.held().params_bytes > 0 and engine.model_state.offloaded() == frozenset()
    engine.destroy()
    engine.destroy()
    same(engine, wanted)


@ranks(2)
@pytest.mark.parametrize("name", ["ds_zero", "plain"])
def test_a_norm_is_clipped_and_told(name: str) -> None:
    engine = start(name, clip=0.05)
    norms = train(engine)
    wanted, true_norms = expected(clip=0.05)
    assert norms == pytest.approx(true_norms, rel=1e-5)
    assert engine.get_global_grad_norm(clipped=True) == pytest.approx(0.05, rel=1e-4)
    engine.destroy()
    same(engine, wanted)


@ranks(2)
@pytest.mark.parametrize(("name", "other"), [("ds_zero", "plain"), ("plain", "ds_zero"), ("plain", "plain")])
def test_what_one_has_written_another_goes_on_from(name: str, other: str, tmp_path: Path) -> None:
    first = start(name)
    train(first, 0, 1)
    first.save_checkpoint(tmp_path)
    first.destroy()
    again = start(other)
    again.load_checkpoint(tmp_path)
    assert again.global_steps == 1
    train(again, 1, STEPS)
    again.destroy()
    same(again, expected()[0])


@ranks(2)
def test_initialize_leaves_the_average_to_an_optimizer_that_takes_it() -> None:
    def made(**settings: Any) -> Engine:
        model = net()
        optimizer = AveragingSGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 0,
            "startup_summary": False,
            **settings,
        }
        return ds_engine.initialize(model, config, optimizer=optimizer)[0]

    with pytest.raises(ds_engine.ConfigError, match=r"(?s)stage is 2: AveragingSGD.*gradient_clipping is 1"):
        made(zero_optimization={"stage": 2}, gradient_clipping=1.0)
    engine = made()
    train(engine)
    assert engine.get_global_grad_norm() is None
    engine.destroy()
    same(engine, expected()[0])
