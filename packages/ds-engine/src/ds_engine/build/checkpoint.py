"""Saves the state of a training run, and restores it: parameters, states, counters, schedule, random generators."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ds_checkpoint import rng
from ds_checkpoint.errors import CheckpointError, LostRanksError
from ds_checkpoint.format import codec, folder, options
from ds_checkpoint.format.model_config import MODEL_CONFIG, model_config
from ds_checkpoint.format.model_part import MODEL_AXES, ModelPart
from ds_checkpoint.interfaces import ShardRecord
from ds_checkpoint.memory.resume import load_newest
from ds_checkpoint.read import opening
from ds_checkpoint.read.checkpoint import Checkpoint
from ds_checkpoint.team import Team
from ds_checkpoint.write.writer import Content, write
from ds_engine.interfaces import StateNames
from ds_engine.job.topology import Axis

if TYPE_CHECKING:
    from ds_engine.engine import Engine

_MODEL_STATES = frozenset({"param", "buffer"})
"""States of the model itself; every other state belongs to the optimizer."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a load restores in addition to parameters and buffers."""

    strict: bool = True
    """Whether to refuse a checkpoint if the model lacks one of its tensors, or if it lacks one of the model's."""
    optimizer: bool = True
    """Whether to restore optimizer states and the options of parameter groups."""
    schedule: bool = True
    counters: bool = True
    """Whether to restore counters of steps and samples, and random generators."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What a save writes in addition to trained parameters and states, and whether `latest` will name it."""

    name_latest: bool = True
    frozen: bool = True
    """Whether to save parameters that do not require a gradient."""


def _part(engine: Engine) -> ModelPart:
    """Returns which values this rank has under the names of its tensors. Stages of a pipeline have different names."""
    axis = engine.topology.tensor
    cut = axis.size > 1 and not engine.topology.logical
    return ModelPart(coordinates={"tensor": (axis.index, axis.size)} if cut else {})


def save(
    engine: Engine,
    save_dir: str | os.PathLike[str],
    tag: str | None,
    client_state: Mapping[str, Any],
    saving: Saving,
) -> str:
    """See `Engine.save_checkpoint`."""
    pending = engine.accumulation.pending
    if pending and engine.world.rank == 0:
        warnings.warn(
            f"this checkpoint was saved after {pending} of {_wanted(engine)} micro-batches: it does not contain "
            "their gradients, and a run that resumes from it repeats these micro-batches; save after an "
            "accumulation boundary",
            stacklevel=3,
        )
    name = tag if tag is not None else f"global_step{engine.global_steps}"
    keep_last = engine.config.checkpoint.keep_last
    name_latest = saving.name_latest

    def content() -> Content:
        return _content(engine, client_state, saving)

    if engine.savers.background is not None:
        return engine.savers.background.save(
            Path(save_dir), name, content, keep_last=keep_last, name_latest=name_latest
        )
    return write(save_dir, name, content, keep_last=keep_last, name_latest=name_latest)


def save_copy(engine: Engine, client_state: Mapping[str, Any]) -> str:
    """See `Engine.save_copy`."""
    if engine.savers.copies is None:
        raise ValueError('save_copy() needs {"checkpoint": {"memory_copies": {}}} in the configuration')
    return engine.savers.copies.write(lambda: _content(engine, client_state, Saving()))


def copy_if_due(engine: Engine) -> None:
    """Saves the state in memory after the steps that the configuration names. A failure only warns, because the
    previous copy is there and training can go on; but the first step of each start raises if memory has no room.
    """
    savers = engine.savers
    if savers.copies is None:
        return
    if not savers.has_room:
        savers.copies.check(lambda: _content(engine, {}, Saving()))
        savers.has_room = True
    if not savers.is_due(engine.global_steps):
        return
    try:
        save_copy(engine, {})
    except LostRanksError:
        raise
    except CheckpointError as error:
        if engine.world.rank == 0:
            warnings.warn(f"step {engine.global_steps} was not copied into memory: {error}", stacklevel=3)


def resume(engine: Engine, load_dir: str | os.PathLike[str]) -> tuple[str, dict[str, Any]] | None:
    """See `Engine.resume`."""
    engine.savers.wait()
    team, order = Team(), engine.model_state.group_names()
    loaded = load_newest(
        Path(load_dir),
        engine.savers.copies,
        team,
        lambda path: opening.open_at(path, order),
        lambda checkpoint: _restore(engine, team, checkpoint, Wanted()),
    )
    return None if loaded is None else (str(loaded[0]), loaded[1])


def _wanted(engine: Engine) -> str:
    return str(engine.batch.steps) if engine.accumulation.managed else "some"


def _content(engine: Engine, client_state: Mapping[str, Any], saving: Saving) -> Content:
    rank = engine.world.rank
    random_values, blobs = rng.capture(rank)
    names, part = engine.model_state.names(), _part(engine)
    left_out: set[str] = set() if saving.frozen else set(names.frozen)
    values: dict[str, Any] = {f"rng/{rank}": random_values}
    residuals = engine.model_state.residuals()
    if residuals is not None:
        key = f"{_residuals_key(engine)}{_replica(engine).index}"
        values[key] = codec.encode(dict(residuals), "the optimizer's residuals", blobs, key)
    if rank == 0:
        values |= _shared_values(engine, client_state, blobs)
        values[MODEL_AXES] = part.axes
    # One rank of each model part; all stages of a pipeline are one part.
    if _replica(engine).index == 0 and engine.topology.pipe.index == 0:
        own = _values_of_names(engine, names, left_out, blobs, f"part{part.index}")
        values |= {part.key: own} if part.coordinates else own
    records = [r for r in engine.model_state.records() if r.fqn not in left_out]
    return Content(
        records=part.placed(records), blobs=blobs, values=values, only_stepped=_only_stepped(engine.module)
    )


def _only_stepped(module: nn.Module) -> Callable[[ShardRecord], bool]:
    """Returns a predicate for records that only an optimizer step changes: False for tensors of the module, which
    user code may change at any time.
    """
    shown = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    return lambda record: (
        not isinstance(record.data, Tensor) or record.data.untyped_storage().data_ptr() not in shown
    )


def _shared_values(
    engine: Engine, client_state: Mapping[str, Any], blobs: dict[str, Tensor]
) -> dict[str, Any]:
    """Returns the values that are the same on every rank; rank 0 writes them."""
    tensors: dict[str, Tensor] = {}
    schedule = engine.lr_scheduler
    values = {
        "counters": {
            "global_steps": engine.global_steps,
            "global_samples": engine.global_samples,
            "micro_steps": engine.micro_steps,
            "skipped_steps": engine.skipped_steps,
        },
        "config": engine.config.model_dump(mode="json", exclude_unset=True),
        "versions": {"torch": str(torch.__version__)},
        MODEL_CONFIG: model_config(engine.module),
        "schedule": None
        if schedule is None
        else {
            "type": type(schedule).__name__,
            "state": codec.encode(schedule.state_dict(), "the schedule's state", tensors, "schedule"),
        },
        "loss_scale": engine.scaler.state_dict(),
        "client_state": codec.encode(dict(client_state), "client_state", tensors, "client"),
        "data": engine.training_dataloader.state_dict() if engine.training_dataloader is not None else None,
    }
    blobs.update(tensors)
    return values


def _values_of_names(
    engine: Engine, names: StateNames, left_out: set[str], blobs: dict[str, Tensor], prefix: str
) -> dict[str, Any]:
    """Returns the values that refer to parameters and groups. They are the same on all ranks that hold the same part
    of the model.
    """
    tensors: dict[str, Tensor] = {}
    groups = options.encode_groups(engine.optimizer, tensors, f"optimizer/{prefix}")
    values = {
        "optimizer": {
            "family": options.family(engine.optimizer),
            "groups": [
                {**group, "num_params": len(of_group)}
                for group, of_group in zip(groups, names.groups, strict=True)
            ],
        },
        "tied": dict(names.tied),
        "frozen": list(names.frozen),
        "left_out": sorted(left_out),
    }
    blobs.update(tensors)
    return values


def load(
    engine: Engine, load_dir: str | os.PathLike[str], tag: str | None, wanted: Wanted
) -> tuple[str, dict[str, Any]]:
    """See `Engine.load_checkpoint`."""
    engine.savers.wait()
    team = Team()
    # Rank 0 locates the checkpoint for all ranks: file systems may show new names at different times.
    root = Path(load_dir)
    path = Path(team.by_first(f"loading from {root}", lambda: str(opening.locate(root, tag))))
    doing = f"loading {path}"
    order = engine.model_state.group_names()
    checkpoint = team.together(doing, lambda: opening.open_at(path, order))
    with checkpoint:
        return str(path), _restore(engine, team, checkpoint, wanted)


def _restore(engine: Engine, team: Team, checkpoint: Checkpoint, wanted: Wanted) -> dict[str, Any]:
    """Loads an open checkpoint, and returns its client state."""
    doing = f"loading {checkpoint.path}"
    # Each rank checks some of the files, so that no file is opened by all ranks. Damage of data is detected on reading.
    team.together(doing, lambda: checkpoint.check_files(team.rank, team.size))
    team.together(doing, lambda: _part(engine).narrow(checkpoint))
    team.together(doing, lambda: _check_fit(engine, checkpoint, wanted))
    if wanted.optimizer and not _has_states(checkpoint):
        engine.optimizer.state.clear()  # saved before the first step: drop this run's optimizer states
    team.together(
        doing,
        lambda: engine.model_state.load_records(
            checkpoint,
            optimizer_states=wanted.optimizer,
            keep=_names(engine) - set(checkpoint.manifest.tensors),
            expect=checkpoint.expect,
        ),
    )
    # Blobs are also read before anything is used, so that all ranks report damage together.
    apply = team.together(doing, lambda: _prepare(engine, checkpoint, wanted))
    team.together(doing, lambda: _check_read(engine, checkpoint, wanted, team))
    return apply()


def _names(engine: Engine) -> set[str]:
    """Returns the names that a checkpoint of this model must contain: parameters under their first name, and
    persistent buffers.
    """
    return set(engine.model_state.names().tensors)


def _has_states(checkpoint: Checkpoint) -> bool:
    return any(not states.keys() <= _MODEL_STATES for states in checkpoint.manifest.tensors.values())


def _check_fit(engine: Engine, checkpoint: Checkpoint, wanted: Wanted) -> None:
    """Raises, before anything is changed, if names, optimizer or groups do not match this engine."""
    model, stored = _names(engine), set(checkpoint.manifest.tensors)
    left_out = set(checkpoint.manifest.values.get("left_out", []))
    missing = sorted(model - stored - left_out) if wanted.strict else []
    unexpected = sorted(stored - model)
    if not model & stored:
        missing = sorted(model)
    if missing or (unexpected and wanted.strict):
        said = [f"{len(model & stored)} of {len(model)} tensors of the model are in the checkpoint"]
        if missing:
            said.append(f"{len(missing)} are missing, the first are {missing[:5]}")
        if unexpected:
            said.append(f"{len(unexpected)} are unknown to the model, the first are {unexpected[:5]}")
        remedy = "use the model it was written for, or load_module_strict=False"
        raise CheckpointError(f"it was written for another model: {'; '.join(said)}; {remedy}")
    if not model:
        raise CheckpointError("the model has no tensors, so nothing would be restored")
    if not wanted.optimizer:
        return
    saved = checkpoint.manifest.values["optimizer"]
    if saved is None:
        raise CheckpointError(
            "it was saved without an optimizer: pass load_optimizer_states=False to begin with fresh states"
        )
    if saved["family"] not in (
        None,
        options.family(engine.optimizer),
    ):  # None: another format, which does not contain it
        raise CheckpointError(
            f"its optimizer states are those of {saved['family']}, but this engine has "
            f"{options.family(engine.optimizer)}: use the same optimizer, or pass load_optimizer_states=False to "
            "start with new states"
        )
    here = [len(group) for group in engine.model_state.names().groups]
    there = [group["num_params"] for group in saved["groups"]]
    if there and here != there:
        raise CheckpointError(
            f"its optimizer has groups of {there} parameters, but this optimizer has groups of {here}: create "
            "the same groups, or pass load_optimizer_states=False"
        )


def _check_read(engine: Engine, checkpoint: Checkpoint, wanted: Wanted, team: Team) -> None:
    """Raises if data was damaged, or if an element of this rank's shards was not loaded."""
    if checkpoint.problems:
        older = [t for t in folder.complete(checkpoint.path.parent) if t != checkpoint.manifest.tag]
        there = f"; there are {', '.join(sorted(older))}" if older else ""
        raise CheckpointError(
            f"{'; '.join(checkpoint.problems)}. The model is now partly loaded: load another checkpoint with "
            f"tag=...{there}"
        )
    for record in engine.model_state.records():
        if record.fqn not in checkpoint.manifest.tensors:
            continue  # left out of the checkpoint, or missing in a load that is not strict
        if record.state not in _MODEL_STATES and not (
            wanted.optimizer and record.state in checkpoint.states(record.fqn, record.coordinates)
        ):
            continue
        begin, end = record.flat_offset, record.flat_offset + record.data.numel()
        if not checkpoint.was_read(record.fqn, record.state, begin, end, record.coordinates):
            raise CheckpointError(
                f"elements {begin} to {end} of {record.state} of {record.fqn!r} were not restored on rank "
                f"{team.rank}"
            )


def _restored(engine: Engine, checkpoint: Checkpoint, wanted: Wanted) -> int:
    """Number of logical tensors that were restored; `_check_read` has verified it."""
    names = _names(engine)
    return sum(
        fqn in names and (wanted.optimizer or state in _MODEL_STATES)
        for fqn, states in checkpoint.manifest.tensors.items()
        for state in states
    )


def _prepare(engine: Engine, checkpoint: Checkpoint, wanted: Wanted) -> Callable[[], dict[str, Any]]:
    """Reads everything except the model's tensors, and returns a function that restores it."""
    values = checkpoint.manifest.values
    rank = engine.world.rank
    client_state: dict[str, Any] = codec.decode(values["client_state"], checkpoint.blob)
    groups = (values["optimizer"] or {}).get("groups", [])
    group_options = [codec.decode(group["options"], checkpoint.blob) for group in groups]
    residuals = _residuals(engine, checkpoint) if wanted.optimizer else []
    schedule = codec.decode(values["schedule"], checkpoint.blob)
    same_ranks = checkpoint.manifest.world_size == engine.world.world_size and f"rng/{rank}" in values
    names = (
        [name for name in checkpoint.manifest.blobs if name.startswith(f"rng/{rank}/")] if same_ranks else []
    )
    generators = {name: checkpoint.blob(name) for name in names}

    def apply() -> dict[str, Any]:
        if wanted.optimizer:
            options.set_options(engine.optimizer, group_options)
            unused = engine.model_state.load_residuals(residuals)
            if unused is not None:
                _tell(engine, f"what compressed gradients have lost begins anew with zeros: {unused}")
        if wanted.schedule:
            _set_schedule(engine, schedule)
        if wanted.optimizer:
            _set_loss_scale(engine, values.get("loss_scale"))
        if wanted.counters:
            _set_counters(engine, _counters(engine, checkpoint))
            _set_position(engine, values.get("data"))
            if same_ranks:
                rng.restore(rank, values[f"rng/{rank}"], generators.__getitem__)
            else:
                rng.derive(rank, engine.global_steps)
                why = (
                    f"written on {checkpoint.manifest.world_size} ranks, loaded on {engine.world.world_size}"
                )
                if f"rng/{rank}" not in values and "rng/0" not in values:
                    why = "it contains no random generators"
                _tell(engine, f"{why}: random generators are seeded anew from rank and step")
        _tell(
            engine,
            f"{_restored(engine, checkpoint, wanted)} of {checkpoint.manifest.num_tensors} tensors restored "
            "from "
            f"{checkpoint.path}",
        )
        return client_state

    return apply


def _replica(engine: Engine) -> Axis:
    """Returns the combined axis of all ranks that write the same values of a model: `samples` x `sequence`, and
    `tensor` if records are those of whole tensors.
    """
    topology = engine.topology
    inner = [topology.sequence, *([topology.tensor] if topology.logical else [])]
    index, size = topology.samples.index, topology.samples.size
    for axis in inner:
        index, size = index * axis.size + axis.index, size * axis.size
    return Axis(index, size)


def _residuals_key(engine: Engine) -> str:
    """Begin of the keys under which ranks save the residuals of their optimizers. Those of pipeline stages are for the
    parameters of one stage, so that another number of stages begins without.
    """
    pipe = engine.topology.pipe
    stage = f"stage{pipe.index}of{pipe.size}/" if pipe.size > 1 else ""
    return f"residuals/part{_part(engine).index}/{stage}"


def _residuals(engine: Engine, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Returns the residuals of this rank, if as many ranks have saved them, else those of all ranks."""
    values, prefix = checkpoint.manifest.values, _residuals_key(engine)
    keys = sorted(key for key in values if key.startswith(prefix) and "/" not in key[len(prefix) :])
    own = _replica(engine)
    if len(keys) == own.size:
        keys = [key for key in keys if key == f"{prefix}{own.index}"]
    return [codec.decode(values[key], checkpoint.blob) for key in keys]


def _set_schedule(engine: Engine, saved: dict[str, Any] | None) -> None:
    schedule = engine.lr_scheduler
    if schedule is None or saved is None:
        if (schedule is None) != (saved is None):
            which = (
                "the checkpoint has a schedule, but this engine has none"
                if schedule is None
                else "the checkpoint has no schedule, but this engine has one"
            )
            warnings.warn(f"the schedule is not restored: {which}", stacklevel=5)
        return
    if saved["type"] != type(schedule).__name__:
        warnings.warn(
            f"the schedule is not restored: the checkpoint has {saved['type']}, this engine "
            f"{type(schedule).__name__}",
            stacklevel=5,
        )
        return
    schedule.load_state_dict(saved["state"])


def _set_loss_scale(engine: Engine, saved: dict[str, Any] | None) -> None:
    """Restores the loss scale. A checkpoint of a run without fp16 has none."""
    if saved:
        engine.scaler.load_state_dict(saved)


def _counters(engine: Engine, checkpoint: Checkpoint) -> Mapping[str, int]:
    counters: Mapping[str, int] | None = checkpoint.manifest.values.get("counters")
    if counters is not None:
        return counters
    if engine.world.rank == 0:
        warnings.warn(
            f"{checkpoint.path} was written without an engine (ds_checkpoint.save) and has no counters: steps and "
            "samples are counted from 0",
            stacklevel=6,
        )
    return {"global_steps": 0, "global_samples": 0, "skipped_steps": 0}


def _set_counters(engine: Engine, counters: Mapping[str, int]) -> None:
    engine.global_steps = counters["global_steps"]
    engine.global_samples = counters["global_samples"]
    engine.skipped_steps = counters["skipped_steps"]
    engine.accumulation.micro_steps = engine.global_steps * engine.batch.steps
    engine.progress.resume(engine.global_samples)


def _set_position(engine: Engine, saved: dict[str, Any] | None) -> None:
    if engine.training_dataloader is None or saved is None:
        return
    try:
        engine.training_dataloader.load_state_dict(saved)
    except ValueError as error:
        warnings.warn(f"the position in training_data is not restored: {error}", stacklevel=5)


def _tell(engine: Engine, text: str) -> None:
    if engine.world.rank == 0:
        engine.progress.write(text)
