"""`verify`: the user's own model, sharded and in plain PyTorch, step by step beside each other."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ds_zero import _registry
from ds_zero.check import check_stage
from ds_zero.comm import Comm
from ds_zero.config import ZeroConfig
from ds_zero.deferred import deferred_init
from ds_zero.deviation import (
    BUFFER,
    GRADIENT,
    LOSS,
    NORM,
    PARAMETER,
    Difference,
    Drift,
    Verification,
    compare,
    judged,
)
from ds_zero.interfaces import ShardStore
from ds_zero.plain import Loss, PlainTraining, Recipe, Schedule, own_randomness, seed_everything
from ds_zero.plan import default_loss
from ds_zero.scaler import DynamicScale, LossScaler
from ds_zero.shard import shard
from ds_zero.train import clip_grad_norm_, destroy, grad_norm
from ds_zero.values import get_full

T = TypeVar("T")
Batches = Callable[[int], Any] | Iterable[Any]


class Candidate(Protocol):
    """A sharded training that `run` judges."""

    @property
    def model(self) -> nn.Module:
        """What `ds_zero.shard` has taken."""

    def micro_batch(self, batch: Any) -> float:
        """Forward and backward; the loss."""

    def step(self) -> None:
        """Clip and step."""

    @property
    def norm(self) -> float:
        """Of the last step's gradient before clipping; NaN where it was not measured."""


def verify(
    make: Callable[[], tuple[nn.Module, Optimizer]],
    batches: Batches,
    loss: Loss | None = None,
    *,
    stage: int = 2,
    config: ZeroConfig | None = None,
    steps: int = 3,
    accumulation_steps: int = 1,
    clip: float | None = None,
    loss_scale: float | DynamicScale | None = None,
    schedule: Callable[[Optimizer], Schedule] | None = None,
    store: ShardStore | None = None,
    comm: Comm | None = None,
    deferred: bool = False,
    bitwise: bool = False,
    seed: int = 0,
) -> Verification:
    """Train `steps` steps sharded and in plain PyTorch, and say where the two first differ, if they do.

    Collective: all ranks of the process group call it alike (or one process without a group), and get the same
    answer. Rank 0 also trains the plain model, on the micro-batches of all ranks, so it needs memory for a whole model
    and optimizer, and the time of all ranks. Gradients are compared before clipping, parameters after the step, all
    tensors of both in every step. See [Note: what plain means] in `plain.py` and [Note: measured deviation] in
    `deviation.py`. Random generators are seeded alike for every micro-batch on both sides, so dropout does not tell
    them apart; they are put back at the end.

    Args:
        make: makes the model and its optimizer, always with the same values from the same random seed. Rank 0 calls it
            twice (with a difference, a third and a fourth time).
        batches: micro-batches: a function from their number to one, or something to iterate over (a list, a data
            loader), which starts again when it ends. Rank 0's are given to all; number k N + r goes to rank r of N.
        loss: from the model and a micro-batch to a scalar. None: the micro-batch is what the model is called with (a
            tensor, a tuple of arguments, or a mapping of keywords), and the loss is the output, its `loss` or its first
            element.
        stage, config, store, comm: as for `shard`.
        accumulation_steps: micro-batches of a rank per step.
        clip: largest norm of the gradient; None: it is not clipped.
        loss_scale: as for `LossScaler`; None: none.
        schedule: makes a learning-rate schedule of an optimizer; moved after every step.
        deferred: construct the sharded model under `deferred_init`.
        bitwise: whether only bitwise equality is `ok`, not also what rounding explains.
        seed: of weights and random numbers.

    Raises:
        ValueError: arguments that cannot work, or a `make` that gives other values each time.
    """
    check_stage(stage)
    if steps < 1 or accumulation_steps < 1:
        raise ValueError(f"steps={steps}, accumulation_steps={accumulation_steps}: give 1 or more")
    own = replace(config or ZeroConfig(), accumulation_steps=accumulation_steps)
    recipe = Recipe(
        make=make,
        loss=loss or default_model_loss,
        config=lambda _: own,
        stage=stage,
        ranks=_world(),
        micro_batches=accumulation_steps,
        clip=math.inf if clip is None else clip,
        scale=loss_scale,
        schedule=(lambda _: None) if schedule is None else schedule,
        seed=seed,
    )
    with own_randomness():
        seed_everything(seed)
        if deferred:
            with deferred_init(stage=stage):
                made = make()
        else:
            made = make()
        shard(*made, stage, config=own, store=store, comm=comm)
        candidate = _Loop(recipe, *made)
        try:
            return run(candidate, recipe, batches, steps=steps, bitwise=bitwise, made=made[0])
        finally:
            candidate.close()


class _Loop:
    """The loop of a user of `shard`."""

    def __init__(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self._recipe, self._optimizer = recipe, optimizer
        self._scaler = LossScaler(model, recipe.scale) if recipe.scale is not None else None
        self._schedule = recipe.schedule(optimizer)
        self.norm = math.nan

    def micro_batch(self, batch: Any) -> float:
        loss = self._recipe.loss(self.model, batch)
        part = loss / self._recipe.micro_batches
        (part if self._scaler is None else self._scaler.scale(part)).backward()
        return loss.item()

    def step(self) -> None:
        if math.isfinite(self._recipe.clip):
            clip_grad_norm_(self.model, self._recipe.clip)
        self._optimizer.step()
        found = grad_norm(self.model)
        self.norm = math.nan if found is None else found.before
        self._optimizer.zero_grad()
        if self._schedule is not None and not (self._scaler is not None and self._scaler.step_was_skipped):
            self._schedule.step()

    def close(self) -> None:
        if _registry.find(self.model) is not None:
            destroy(self.model)


def default_model_loss(model: Any, batch: Any) -> Tensor:
    """The model called with the micro-batch, and the loss that its output names."""
    if isinstance(batch, Mapping):
        return default_loss(model(**batch))
    return default_loss(model(*batch) if isinstance(batch, (tuple, list)) else model(batch))


# --- step by step


def run(
    candidate: Candidate,
    recipe: Recipe,
    batches: Batches,
    *,
    steps: int,
    bitwise: bool = False,
    made: nn.Module | None = None,
    what: str | None = None,
) -> Verification:
    """Judge a training that stands ready. Collective.

    Args:
        made: the candidate's model, if the plain one must be another object.
        what: names the configuration; default from the recipe.
    """
    lockstep = _Lockstep(candidate, recipe, batches, steps)
    lockstep.begin(made)
    for step in range(1, steps + 1):
        lockstep.step(step)
    exact = _from_first(lambda: not lockstep.differences)
    found = () if exact else lockstep.judged()
    plain = lockstep.plain
    result: Verification | None = None
    if plain is not None:
        result = Verification(
            what=what or _describe(recipe, plain),
            ranks=recipe.ranks,
            steps=steps,
            tensors=len(plain.values()),
            losses=tuple(lockstep.losses),
            plain_losses=tuple(lockstep.plain_losses),
            differences=found,
            notes=_notes(plain, bool(found)),
            bitwise_wanted=bitwise,
        )
    answer = _from_first(lambda: result)
    assert answer is not None
    return answer


class _Lockstep:
    """Both trainings, one step at a time; the plain one on rank 0 alone."""

    def __init__(self, candidate: Candidate, recipe: Recipe, batches: Batches, steps: int) -> None:
        self._candidate, self._recipe = candidate, recipe
        self._first = _rank() == 0
        self._device = next(iter(candidate.model.parameters())).device
        self._stream = _numbered(batches) if self._first else iter(())
        self._kept: list[list[list[Any]]] = []
        self.plain: PlainTraining | None = None
        self.differences: list[Difference] = []
        self.losses: list[float] = []
        self.plain_losses: list[float] = []
        self._modules: dict[str, str] = {}

    def begin(self, made: nn.Module | None) -> None:
        """Construct the plain training, and see that both start from the same values."""

        def construct() -> None:
            self.plain = PlainTraining(self._recipe)
            if self.plain.keeper is made:
                raise ValueError(
                    "the function that makes the model returned the same object twice: construct a new model in it"
                )
            if any(p.is_meta for p in self.plain.keeper.parameters()):
                raise ValueError(
                    "the function that makes the model leaves parameters on the meta device: construct it outside of "
                    "deferred_init, and say deferred=True where it shall be sharded from there"
                )
            for name, _ in self.plain.keeper.named_parameters():
                owner = name.rpartition(".")[0]
                kind = type(self.plain.keeper.get_submodule(owner)).__name__
                self._modules[name] = f"{owner} ({kind})" if owner else kind

        _from_first(construct)
        self._compare_parameters(0)
        if _from_first(lambda: bool(self.differences)):
            names = _from_first(lambda: [d.name for d in self.differences]) or []
            raise ValueError(
                f"{len(names)} parameters start with other values than in plain PyTorch, first {names[0]!r}: the "
                "function that makes the model has to give the same values after the same torch.manual_seed"
            )

    def step(self, step: int) -> None:
        """One optimizer step of both, compared."""
        recipe, rank = self._recipe, _rank()
        first = (step - 1) * recipe.micro_batches * recipe.ranks
        table = _from_first(self._take)
        assert table is not None
        table = _moved(table, self._device)
        if self._first:
            self._kept.append(table)
        own = []
        for k, row in enumerate(table):
            seed_everything(recipe.seed, first + k * recipe.ranks + rank)
            own.append(self._candidate.micro_batch(row[rank]))
        losses = _everybodys(own)
        _from_first(lambda: self._plain_gradients(step, table, losses, first))
        self._compare_gradients(step)
        self._candidate.step()
        _from_first(lambda: self._plain_update(step))
        self._compare_parameters(step)

    def judged(self) -> tuple[Difference, ...]:
        """The differences with bounds, [Note: measured deviation]."""
        return _from_first(lambda: judged(self.differences, self._drift()))

    # --- on rank 0

    def _take(self) -> list[list[Any]]:
        ranks, micros = self._recipe.ranks, self._recipe.micro_batches
        return _moved(
            [[next(self._stream) for _ in range(ranks)] for _ in range(micros)], torch.device("cpu")
        )

    def _plain_gradients(
        self, step: int, table: Sequence[Sequence[Any]], losses: Sequence[Sequence[float]], first: int
    ) -> None:
        assert self.plain is not None
        expected = self.plain.gradients(table, first)
        for k, row in enumerate(expected):
            for r, plain in enumerate(row):
                name = _loss_name(k, r)
                self._note(_number(losses[r][k]), _number(plain), step, LOSS, name)
        flat = [loss for row in expected for loss in row]
        self.plain_losses.append(math.fsum(flat) / len(flat))
        mine = [loss for row in losses for loss in row]
        self.losses.append(math.fsum(mine) / len(mine))

    def _plain_update(self, step: int) -> None:
        assert self.plain is not None
        self.plain.update()
        if not math.isnan(self._candidate.norm):
            self._note(_number(self._candidate.norm), _number(self.plain.norm), step, NORM, "all parameters")

    def _note(self, found: Tensor | None, plain: Tensor | None, step: int, kind: str, name: str) -> None:
        difference = compare(
            found, plain, step=step, kind=kind, name=name, module=self._modules.get(name, "")
        )
        if difference is not None:
            self.differences.append(difference)

    def _drift(self) -> Drift:
        """Plain PyTorch twice more, once with numbers moved by one ULP."""
        drift, recipe = Drift(), self._recipe
        pair = PlainTraining(recipe), PlainTraining(recipe, disturb=recipe.seed + 1)
        for step, table in enumerate(self._kept, 1):
            first = (step - 1) * recipe.micro_batches * recipe.ranks
            one, two = (training.gradients(table, first) for training in pair)
            drift.note(
                step,
                LOSS,
                [
                    (_loss_name(k, r), _number(loss), _number(two[k][r]))
                    for k, row in enumerate(one)
                    for r, loss in enumerate(row)
                ],
            )
            names = [n for n in pair[0].names if pair[0].gradient(n) is not None]
            drift.note(step, GRADIENT, _pairs(names, *(t.gradient for t in pair)))
            for training in pair:
                training.update()
            drift.note(step, NORM, [("all parameters", _number(pair[0].norm), _number(pair[1].norm))])
            for kind in (PARAMETER, BUFFER):
                values = [training.values(kind) for training in pair]
                drift.note(step, kind, _pairs(values[0], values[0].get, values[1].get))
        return drift

    # --- on all ranks

    def _compare_gradients(self, step: int) -> None:
        """From the loss backwards: what goes wrong in backward goes wrong in everything that comes later in it."""
        names = _from_first(lambda: self.plain.names if self.plain is not None else [])
        for name in reversed(names or []):
            found = get_full(self._candidate.model, name, "grad")
            if self.plain is not None:
                self._note(found, self.plain.gradient(name), step, GRADIENT, name)

    def _compare_parameters(self, step: int) -> None:
        names = _from_first(lambda: list(self.plain.values()) if self.plain is not None else [])
        plain = self.plain.values() if self.plain is not None else {}
        for name in names or []:
            found = get_full(self._candidate.model, name)
            if self.plain is not None:
                self._note(found, plain[name], step, PARAMETER, name)
        if self.plain is not None and step:
            buffers = dict(self._candidate.model.named_buffers())
            for name, value in self.plain.values(BUFFER).items():
                self._note(buffers.get(name), value, step, BUFFER, name)


def _pairs(
    names: Iterable[str], one: Callable[[str], Tensor | None], two: Callable[[str], Tensor | None]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name in names:
        plain, moved = one(name), two(name)
        if plain is not None and moved is not None:
            yield name, plain, moved


def _moved(table: list[list[Any]], device: torch.device) -> list[list[Any]]:
    """Micro-batches with their tensors on one device: what another rank sent was on a device of its own."""
    return tree_map_only(Tensor, lambda t: t.to(device), table)  # type: ignore[no-any-return]


def _loss_name(k: int, rank: int) -> str:
    return f"micro-batch {k + 1} on rank {rank}"


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _numbered(batches: Batches) -> Iterator[Any]:
    if callable(batches):
        yield from map(batches, itertools.count())
        return
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("there are no micro-batches: `batches` is empty, or an iterator that has ended")


# --- ranks


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _from_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on all ranks; an error there is raised everywhere."""
    box: list[Any] = [None, None]
    if _rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            # The others wait: whatever it is, they have to hear of it.
            if _world() == 1:
                raise
            box[1] = _told(error)
    if _world() > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    found: T = box[0]
    return found


def _told(error: Exception) -> Exception:
    """The error, or one that can be sent in its place."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (whatever an exception class does when it is pickled)
        return ValueError(f"on rank 0: {type(error).__name__}: {error}")
    return error


def _everybodys(own: list[float]) -> list[list[float]]:
    """Every rank's list."""
    if _world() == 1:
        return [own]
    told: list[Any] = [None] * _world()
    dist.all_gather_object(told, own)
    return told


# --- words


def _describe(recipe: Recipe, plain: PlainTraining) -> str:
    ranks = f"{recipe.ranks} rank{'s' * (recipe.ranks != 1)}"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in plain.worker.parameters()})
    sums = "one micro-batch"
    if recipe.micro_batches > 1:
        sums = f"{recipe.micro_batches} micro-batches added {'before' if plain.local else 'after'} reduction"
    return (
        f"{type(plain.keeper).__name__} at stage {recipe.stage} on {ranks}, {type(plain.optimizer).__name__}, "
        f"{', '.join(dtypes)}, {sums}"
    )


def _notes(plain: PlainTraining, differs: bool) -> tuple[str, ...]:
    found = []
    if differs and next(iter(plain.worker.parameters())).device.type == "cpu":
        found.append(
            "On the CPU most configurations are bitwise plain PyTorch (docs/benchmarks/parity.md), so a small "
            "difference, too, may be a fault: bitwise=True (--bitwise) lets none pass."
        )
    if plain.draws:
        found.append(
            "The model draws random numbers (dropout): both sides were seeded alike for every micro-batch."
        )
    if plain.steps and plain.skipped:
        found.append(
            f"{plain.skipped} of {plain.steps} steps were left out: their gradients were not finite."
        )
    return tuple(found)
