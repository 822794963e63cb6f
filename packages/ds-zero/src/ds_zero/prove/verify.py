"""`verify`: trains the user's model sharded and in plain PyTorch, and compares both step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.api.loop import clip_grad_norm_, destroy, grad_norm
from ds_zero.api.shard import shard
from ds_zero.checks import check_stage
from ds_zero.comm.collectives import Comm
from ds_zero.comm.ranks import Group, ranks_of
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import CollectiveSet, ShardStore
from ds_zero.params.deferred import deferred_init
from ds_zero.predict.plan import default_loss
from ds_zero.prove.deviation import Verification
from ds_zero.prove.lockstep import (
    Batches,
    Candidate,
    Lockstep,
    ModelPerRank,
    from_first,
    own_rank,
    world_size,
)
from ds_zero.prove.reference_training import (
    Loss,
    PlainTraining,
    Recipe,
    Schedule,
    own_randomness,
    seed_everything,
)
from ds_zero.runtime.gradients.loss_scaler import DynamicScale, LossScaler


def verify(
    make: Callable[[], tuple[nn.Module, Optimizer]],
    batches: Batches,
    loss: Loss | None = None,
    *,
    stage: int = 2,
    mesh: Group | None = None,
    config: ZeroConfig | None = None,
    steps: int = 3,
    accumulation_steps: int = 1,
    clip: float | None = None,
    loss_scale: float | DynamicScale | None = None,
    schedule: Callable[[Optimizer], Schedule] | None = None,
    store: ShardStore | None = None,
    comm: Comm | CollectiveSet | None = None,
    deferred: bool = False,
    bitwise: bool = False,
    seed: int = 0,
) -> Verification:
    """Trains `steps` steps sharded and in plain PyTorch, and reports all differences.

    Collective: all ranks of the process group (or one process without a group) must call it with the same arguments,
    and get the same result. Rank 0 also trains the plain model, on the micro-batches of all ranks, so it needs memory
    for a whole model and optimizer, and computes as much as all ranks together. Gradients are compared before
    clipping, parameters after the step, all tensors of both in every step. See [Note: reference training] in
    `prove/reference_training.py` and [Note: bounds of rounding] in `prove/deviation.py`. For every micro-batch,
    random generators get the same seed on both sides, so dropout causes no difference. They are restored at the end.

    Args:
        make: returns the model and its optimizer, with the same values after the same random seed. Rank 0 calls it
            twice.
        batches: micro-batches: a function from a number to a micro-batch, or an iterable (a list, a data loader),
            which is restarted at its end. All ranks use those of rank 0: number k N + r goes to rank r of N.
        loss: a function from the model and a micro-batch to a scalar. None: the model is called with the micro-batch
        (a tensor, a tuple of arguments, or a mapping of keywords), and the loss is the output, its `loss` or its
        first element. stage, config, store, comm: as for `shard`.
        mesh: as for `shard`: one axis, or two (replicate, shard), with all ranks of the process group in order.
            Experts on other meshes (`mesh_for`) and model-parallel models (`model_parallel`) are not supported,
            because rank 0 cannot train them alone.
        accumulation_steps: number of micro-batches per rank and step.
        clip: maximum norm of the gradient; None: no clipping.
        loss_scale: as for `LossScaler`; None: no loss scaling.
        schedule: makes a learning-rate schedule from the optimizer; it is stepped after every step.
        deferred: construct the sharded model under `deferred_init`.
        bitwise: whether `ok` requires bitwise equality, instead of differences that rounding can explain.
        seed: seed of weights and random numbers.

    Raises:
        ValueError: invalid arguments, or `make` returns different values each time.
    """
    check_stage(stage)
    if steps < 1 or accumulation_steps < 1:
        raise ValueError(f"steps={steps}, accumulation_steps={accumulation_steps}: give 1 or more")
    _check_mesh(mesh)
    own = replace(config or ZeroConfig(), accumulation_steps=accumulation_steps)
    recipe = Recipe(
        make=make,
        loss=loss or default_model_loss,
        config=lambda _: own,
        stage=stage,
        ranks=world_size(),
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
        shard(*made, stage, mesh, config=own, store=store, comm=comm)
        candidate = _Loop(recipe, *made)
        try:
            return run(candidate, recipe, batches, steps=steps, bitwise=bitwise, made=made[0])
        finally:
            candidate.close()


def _check_mesh(mesh: Group | None) -> None:
    """Checks that `mesh` contains all ranks in order, so that micro-batch k N + r is that of rank r."""
    mesh_ranks = ranks_of(mesh)
    across = mesh_ranks.replicas.rank if mesh_ranks.replicas is not None else 0
    if (mesh_ranks.total, across * mesh_ranks.size + mesh_ranks.rank) != (world_size(), own_rank()):
        raise ValueError(
            f"mesh has {mesh_ranks.total} ranks, the process group {world_size()}: pass a mesh of all ranks in order, "
            'for example init_device_mesh("cpu", (replicas, shards))'
        )


class _Loop(ModelPerRank):
    """The training loop of a user of `shard`."""

    def __init__(self, recipe: Recipe, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.recipe = model, recipe
        self._optimizer = optimizer
        self._scaler = LossScaler(model, recipe.scale) if recipe.scale is not None else None
        self._schedule = recipe.schedule(optimizer)

    def micro_batch(self, batch: Any) -> float:
        loss = self.recipe.loss(self.model, batch)
        part = loss / self.recipe.micro_batches
        (part if self._scaler is None else self._scaler.scale(part)).backward()
        return loss.item()

    def step(self) -> None:
        if math.isfinite(self.recipe.clip):
            clip_grad_norm_(self.model, self.recipe.clip)
        self._optimizer.step()
        norm = grad_norm(self.model)
        self.norm = math.nan if norm is None else norm.before
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
    """Verifies a prepared training. Collective.

    Args:
        made: the candidate's model, if the plain one must be another object.
        what: names the configuration; default from the recipe.
    """
    lockstep = Lockstep(candidate, recipe, batches)
    lockstep.begin(made)
    for step in range(1, steps + 1):
        lockstep.step(step)
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
            differences=tuple(lockstep.differences),
            notes=_notes(plain, bool(lockstep.differences)),
            bitwise_wanted=bitwise,
        )
    answer = from_first(lambda: result)
    assert answer is not None
    return answer


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
    notes = []
    if differs and next(iter(plain.worker.parameters())).device.type == "cpu":
        notes.append(
            "On the CPU most configurations are bitwise equal to plain PyTorch (docs/benchmarks/parity.md), so "
            "even a small difference may be a fault: bitwise=True (--bitwise) accepts none."
        )
    if plain.draws:
        notes.append(
            "The model draws random numbers (dropout): both sides had the same seed for every micro-batch."
        )
    if plain.steps and plain.skipped:
        notes.append(f"{plain.skipped} of {plain.steps} steps were skipped: their gradients were not finite.")
    return tuple(notes)
