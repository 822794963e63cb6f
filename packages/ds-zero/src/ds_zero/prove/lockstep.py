"""Runs sharded and plain training in lockstep."""

from __future__ import annotations

import itertools
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ds_zero.params.access import GRAD, PARAM, get_full
from ds_zero.prove.deviation import (
    BUFFER,
    GRADIENT,
    LOSS,
    NORM,
    PARAMETER,
    STATE,
    Difference,
    compare,
    measured,
    rounded,
)
from ds_zero.prove.reference_training import PlainTraining, Recipe, seed_everything

T = TypeVar("T")
Batches = Callable[[int], Any] | Iterable[Any]


class Candidate(ABC):
    """The sharded training that `run` verifies."""

    model: nn.Module
    """The sharded model."""
    recipe: Recipe
    norm = math.nan
    """Norm of the last step's gradient before clipping; NaN if it was not measured."""
    in_stages = False
    """Whether ranks construct and compute different layers. Then the plain training takes over the initial values, and
    the model must not draw random numbers, which would depend on the rank.
    """

    @abstractmethod
    def train(self, table: Sequence[Sequence[Any]], first: int) -> Mapping[str, float]:
        """Runs forwards and backwards of a step. Collective.

        Args:
            table: micro-batch k of rank r is `table[k][r]`.
            first: number of the first micro-batch among all of the training.

        Returns:
            Losses by the names of `named_losses`.
        """

    @abstractmethod
    def step(self) -> None:
        """Clips and steps."""

    def named_losses(self, losses: Sequence[Sequence[float]]) -> Mapping[str, float]:
        """Returns what is compared of the losses of all micro-batches, `losses[k][r]`, by name."""
        return {
            f"micro-batch {k + 1} on rank {r}": loss
            for k, row in enumerate(losses)
            for r, loss in enumerate(row)
        }

    def full(self, name: str, kind: str = PARAM) -> Tensor | None:
        """Returns a whole value as `get_full` does, at least on rank 0. Collective."""
        return get_full(self.model, name, kind)

    def buffers(self) -> Mapping[str, Tensor]:
        """Returns the buffers of the first rank, at least there. Collective."""
        return dict(self.model.named_buffers())


class ModelPerRank(Candidate):
    """A training in which each rank computes the whole model, one micro-batch after the other."""

    @abstractmethod
    def micro_batch(self, batch: Any) -> float:
        """Runs forward and backward, and returns the loss."""

    def train(self, table: Sequence[Sequence[Any]], first: int) -> Mapping[str, float]:
        """See `Candidate.train`."""
        ranks, rank, own = self.recipe.ranks, own_rank(), []
        for k, row in enumerate(table):
            seed_everything(self.recipe.seed, first + k * ranks + rank)
            own.append(self.micro_batch(row[rank]))
        return self.named_losses(list(zip(*_gathered(own), strict=True)))


class Lockstep:
    """Both trainings, one step at a time; the plain training runs only on rank 0."""

    def __init__(self, candidate: Candidate, recipe: Recipe, batches: Batches) -> None:
        self._candidate, self._recipe = candidate, recipe
        self._device = next(iter(candidate.model.parameters())).device
        self._stream = _numbered(batches) if own_rank() == 0 else iter(())
        self.plain: PlainTraining | None = None
        self.differences: list[Difference] = []
        """Differences of all steps so far, with their bounds."""
        self._fresh: list[Difference] = []
        """Differences of the present part of the step, without bounds."""
        self._sharded_values: dict[str, Tensor] = {}
        """Values of the sharded training for tensors that differ."""
        self._buffer_bounds: dict[str, float] = {}
        self.losses: list[float] = []
        self.plain_losses: list[float] = []
        self._losses: Mapping[str, float] = {}
        self._modules: dict[str, str] = {}

    def begin(self, made: nn.Module | None) -> None:
        """Constructs the plain training, and checks that both start from the same values."""

        def construct() -> None:
            self.plain = PlainTraining(self._recipe)
            if self.plain.keeper is made:
                raise ValueError(
                    "the function that makes the model returned the same object twice: construct a new model in it"
                )
            if any(p.is_meta for p in self.plain.keeper.parameters()):
                raise ValueError(
                    "the function that makes the model leaves parameters on the meta device: construct it "
                    "outside of deferred_init, and pass deferred=True to construct the sharded model under "
                    "deferred_init"
                )
            for name, _ in self.plain.keeper.named_parameters():
                owner = name.rpartition(".")[0]
                kind = type(self.plain.keeper.get_submodule(owner)).__name__
                self._modules[name] = f"{owner} ({kind})" if owner else kind

        from_first(construct)
        self._compare_parameters(0)
        self._start_alike()

    def _start_alike(self) -> None:
        """Takes over the initial values of ranks with different layers; otherwise raises ValueError if they differ."""
        if self._candidate.in_stages:
            from_first(self._adopt)
            return
        names = from_first(lambda: [d.name for d in self._fresh])
        if names:
            raise ValueError(
                f"{len(names)} parameters start with other values than in plain PyTorch, the first is "
                f"{names[0]!r}: the function that makes the model must give the same values after the same "
                "torch.manual_seed"
            )

    def _adopt(self) -> None:
        """The plain training goes on from the values of the sharded one."""
        assert self.plain is not None
        for name, value in self._sharded_values.items():
            self.plain.adopt(name, value)
        self._fresh, self._sharded_values = [], {}

    def step(self, step: int) -> None:
        """Runs one optimizer step of both, and compares them."""
        recipe = self._recipe
        first = (step - 1) * recipe.micro_batches * recipe.ranks
        table = from_first(self._take)
        assert table is not None
        table = _moved(table, self._device)
        losses = self._candidate.train(table, first)
        from_first(lambda: self._plain_gradients(step, table, losses, first))
        self._compare_gradients(step)
        from_first(lambda: self._judge_gradients(table, first))
        self._candidate.step()
        from_first(lambda: self._plain_update(step))
        self._compare_parameters(step)
        if from_first(lambda: self._judge_parameters(step)):
            self._follow(step)

    # --- on rank 0

    def _take(self) -> list[list[Any]]:
        ranks, micros = self._recipe.ranks, self._recipe.micro_batches
        return _moved(
            [[next(self._stream) for _ in range(ranks)] for _ in range(micros)], torch.device("cpu")
        )

    def _plain_gradients(
        self, step: int, table: Sequence[Sequence[Any]], losses: Mapping[str, float], first: int
    ) -> None:
        assert self.plain is not None
        expected = self._losses = self._candidate.named_losses(self.plain.gradients(table, first))
        if self.plain.draws and self._candidate.in_stages:
            raise ValueError(
                "the model draws random numbers (dropout), which depend on the rank that computes a layer: set the "
                "probabilities to 0 for the comparison"
            )
        for name, plain in expected.items():
            self._note(_number(losses[name]), _number(plain), step, LOSS, name)
        self.plain_losses.append(math.fsum(expected.values()) / len(expected))
        self.losses.append(math.fsum(losses.values()) / len(losses))

    def _judge_gradients(self, table: Sequence[Sequence[Any]], first: int) -> None:
        """Computes bounds for the differences so far. The plain training then steps with the gradient of the sharded
        training.
        """
        plain = self.plain
        assert plain is not None
        if not self._fresh:
            return
        bounds: dict[tuple[str, str], float] = {}
        on_cpu = self._device.type == "cpu"
        if not on_cpu or any(d.kind == LOSS for d in self._fresh):
            losses, grads, buffers = plain.disturbed(table, first)
            same = [(n, v) for n in plain.names if n in grads and (v := plain.gradient(n)) is not None]
            kept, moved = self._losses, self._candidate.named_losses(losses)
            tables = {
                LOSS: measured((n, _number(kept[n]), _number(moved[n])) for n in kept),
                GRADIENT: measured((n, v, grads[n]) for n, v in same),
                BUFFER: measured((n, v, buffers[n]) for n, v in plain.values(BUFFER).items() if n in buffers),
            }
            bounds = {(kind, n): bound for kind, one in tables.items() for n, bound in one.items()}
            for name, bound in tables[BUFFER].items():
                self._buffer_bounds[name] = self._buffer_bounds.get(name, 0.0) + bound
        ordered = on_cpu and plain.config.ordered_reduction is not False
        for d in self._fresh:
            bound = bounds.get((d.kind, d.name), 0.0)
            if d.kind == GRADIENT:
                bound += plain.sum_error(d.name, ordered=ordered)
            self.differences.append(replace(d, bound=bound))
        for name, value in self._sharded_values.items():
            plain.adopt_gradient(name, value)
        self._fresh, self._sharded_values = [], {}

    def _plain_update(self, step: int) -> None:
        assert self.plain is not None
        self.plain.update()
        if not math.isnan(self._candidate.norm):
            self._note(_number(self._candidate.norm), _number(self.plain.norm), step, NORM, "all parameters")

    def _note(self, sharded: Tensor | None, plain: Tensor | None, step: int, kind: str, name: str) -> None:
        difference = compare(
            sharded, plain, step=step, kind=kind, name=name, module=self._modules.get(name, "")
        )
        if difference is not None:
            self._fresh.append(difference)
            if sharded is not None and kind in (GRADIENT, PARAMETER):
                self._sharded_values[name] = sharded

    def _judge_parameters(self, step: int) -> bool:
        """Computes bounds for the differences after the step. Returns whether anything differed in this step."""
        plain = self.plain
        assert plain is not None
        values = plain.values()
        for d in self._fresh:
            if d.kind == PARAMETER:
                bound = rounded(values[d.name]) if d.name in plain.names else 0.0
            elif d.kind == BUFFER:
                bound = max(self._buffer_bounds.get(d.name, 0.0), rounded(plain.values(BUFFER)[d.name]))
            else:
                bound = rounded(_number(plain.norm))
            self.differences.append(replace(d, bound=bound))
        self._adopt()
        return any(d.step == step for d in self.differences)

    # --- on all ranks

    def _compare_gradients(self, step: int) -> None:
        """Compares gradients from the loss backwards: an error in backward spreads to all later gradients."""
        names = from_first(lambda: self.plain.names if self.plain is not None else [])
        for name in reversed(names or []):
            sharded = self._candidate.full(name, GRAD)
            if self.plain is not None:
                self._note(sharded, self.plain.gradient(name), step, GRADIENT, name)

    def _compare_parameters(self, step: int) -> None:
        names = from_first(lambda: list(self.plain.values()) if self.plain is not None else [])
        plain = self.plain.values() if self.plain is not None else {}
        for name in names or []:
            sharded = self._candidate.full(name)
            if self.plain is not None:
                self._note(sharded, plain[name], step, PARAMETER, name)
        buffers = self._candidate.buffers() if step else {}
        if self.plain is not None and step:
            for name, value in self.plain.values(BUFFER).items():
                self._note(buffers.get(name), value, step, BUFFER, name)

    def _follow(self, step: int) -> None:
        """Compares optimizer states; the plain training continues with those of the sharded training."""
        plain = self.plain
        for name, kind in from_first(lambda: plain.states() if plain is not None else []):
            sharded = self._candidate.full(name, kind)
            if plain is None:
                continue
            expected = plain.state(name, kind)
            difference = compare(
                sharded, expected, step=step, kind=f"{STATE} {kind}", name=name, module=self._modules[name]
            )
            if difference is not None:
                self.differences.append(replace(difference, bound=rounded(expected)))
            if sharded is not None:
                plain.adopt_state(name, kind, sharded)


def _moved(table: list[list[Any]], device: torch.device) -> list[list[Any]]:
    """Moves the tensors of micro-batches to one device; those from other ranks were on the devices of these ranks."""
    return tree_map_only(Tensor, lambda t: t.to(device), table)  # type: ignore[no-any-return]


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


def world_size() -> int:
    """Returns the number of ranks of the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    """Returns this rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def from_first(make: Callable[[], T]) -> T:
    """Calls `make` on rank 0, and returns its result on all ranks. An error is raised on all ranks."""
    box: list[Any] = [None, None]
    if own_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            # Any error must be sent to the other ranks, which wait.
            if world_size() == 1:
                raise
            box[1] = _told(error)
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    answer: T = box[0]
    return answer


def _told(error: Exception) -> Exception:
    """Returns the error, or one that can be pickled in its place."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (whatever an exception class does when it is pickled)
        return ValueError(f"on rank 0: {type(error).__name__}: {error}")
    return error


def _gathered(own: list[float]) -> list[list[float]]:
    """Returns the lists of all ranks."""
    if world_size() == 1:
        return [own]
    of_ranks: list[Any] = [None] * world_size()
    dist.all_gather_object(of_ranks, own)
    return of_ranks
