"""`save` and `load`: checkpoints of a model and an optimizer, without an engine."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_checkpoint import rng
from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import codec, folder, options
from ds_checkpoint.format.model_config import MODEL_CONFIG, model_config
from ds_checkpoint.format.model_part import refuse_parts
from ds_checkpoint.format.records import BUFFER, PARAM
from ds_checkpoint.memory.copies import MemoryCopies
from ds_checkpoint.memory.resume import load_newest
from ds_checkpoint.owners import Claim, names, owner_of
from ds_checkpoint.owners.job_names import JobNames, job_names
from ds_checkpoint.read import opening
from ds_checkpoint.read.checkpoint import Checkpoint
from ds_checkpoint.team import Team
from ds_checkpoint.write.writer import Content, write


def save(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    tag: str | None = None,
    keep_last: int | None = None,
    owners: Sequence[Claim] | None = None,
) -> str:
    """Writes a checkpoint into `directory`, atomically, and makes `latest` name it. All ranks must call it.

    The model may be plain, or sharded by ds_zero or FSDP2, or a `ds_pipe.model.PipelineModule`, of which every rank has
    other layers. It saves parameters, persistent buffers, optimizer states,
    the options of parameter groups, `extra`, and the random generators of every rank.

    Args:
        extra: name -> other state to save: numbers, strings, tensors, lists, tuples and dicts of these, or objects
            with `state_dict` and `load_state_dict` (schedulers, loaders, scalers). Rank 0's values are saved.
        tag: name of the checkpoint's folder. Default: "save000001", "save000002", ...
        keep_last: number of checkpoints to keep; older ones are removed. Default: all are kept.
        owners: functions that may claim the model's state. Default: the entry points of imported packages.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: on every rank, if any rank failed. The directory is unchanged.
    """
    team, root = Team(), Path(directory)
    name = tag if tag is not None else team.by_first(f"saving into {root}", lambda: _next_tag(root))
    content = _content(team, f"saving {root / name}", model, optimizer, extra, owners)
    return write(root, name, lambda: content, keep_last=keep_last, team=team)


def save_copy(
    copies: MemoryCopies,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    *,
    owners: Sequence[Claim] | None = None,
) -> str:
    """As `save`, into the memory of hosts. The previous copy is removed when this one is complete on all hosts.

    Returns:
        The folder on this host.

    Raises:
        CheckpointError: on every rank, if any rank failed, for example because memory is full. The previous copy is
            unchanged, and training can go on, except after a LostRanksError.
    """
    content = _content(Team(), "copying the state into memory", model, optimizer, extra, owners)
    return copies.write(lambda: content)


def _content(
    team: Team,
    doing: str,
    model: nn.Module,
    optimizer: Optimizer | None,
    extra: Mapping[str, Any] | None,
    owners: Sequence[Claim] | None,
) -> Content:
    owner = team.together(doing, lambda: owner_of(model, optimizer, owners))
    known = job_names(team, model, optimizer)
    values, blobs = team.together(doing, lambda: _values_of(team, model, optimizer, extra or {}, known))
    # Not in `write`: owners may use collectives, and a rank that failed alone there would leave the others waiting.
    return Content(records=owner.records(), blobs=blobs, values=values)


def _next_tag(root: Path) -> str:
    return f"save{folder.next_sequence(root):06d}"


def _values_of(
    team: Team, model: nn.Module, optimizer: Optimizer | None, extra: Mapping[str, Any], known: JobNames
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Encodes everything but the model's tensors: values as JSON, and the tensors among them."""
    random_values, blobs = rng.capture(team.rank)
    values: dict[str, Any] = {f"rng/{team.rank}": random_values}
    if team.first:
        tensors: dict[str, Tensor] = {}
        plain = {key: value.state_dict() if _is_stateful(value) else value for key, value in extra.items()}
        values |= {
            "client_state": codec.encode(plain, "extra", tensors, "client"),
            "optimizer": None
            if optimizer is None
            else {
                "family": options.family(optimizer),
                "groups": [
                    {**group, "num_params": size}
                    for group, size in zip(
                        options.encode_groups(optimizer, tensors, "optimizer"), known.group_sizes, strict=True
                    )
                ],
            },
            "schedule": None,
            "tied": dict(known.tied),
            "frozen": list(known.frozen),
            "versions": {"torch": str(torch.__version__)},
            MODEL_CONFIG: model_config(model),
        }
        blobs |= tensors
    return values, blobs


def _is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def load(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: MutableMapping[str, Any] | None = None,
    *,
    tag: str | None = None,
    strict: bool = True,
    owners: Sequence[Claim] | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint, written on any number of ranks, into a model and its optimizer. All ranks must call it.

    On the same number of ranks, random generators are restored, too, and training continues bitwise as if it had not
    stopped.

    Args:
        directory: the directory that was passed to `save`, or the folder of one checkpoint.
        optimizer: None loads the model alone.
        extra: receives the saved values; the state of objects with `load_state_dict` is restored in place.
        tag: name of the checkpoint. Default: the one that `latest` names.
        strict: refuse a checkpoint with tensors that the model lacks. A tensor of the model that the checkpoint lacks
            is always an error.
        owners: as for `save`.

    Returns:
        The saved `extra`, with the state of each object in place of the object.

    Raises:
        FileNotFoundError: there is no checkpoint. The message lists the contents of the directory.
        CheckpointError: on every rank, if the checkpoint is damaged or does not match the model.
    """
    team, root = Team(), Path(directory)
    path = Path(team.by_first(f"loading from {root}", lambda: str(opening.locate_any(root, tag))))
    with team.together(f"loading {path}", lambda: opening.open_at(path)) as checkpoint:
        return _restore(team, checkpoint, model, optimizer, extra, strict=strict, owners=owners)


def resume(
    directory: str | os.PathLike[str],
    copies: MemoryCopies | None,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: MutableMapping[str, Any] | None = None,
    *,
    strict: bool = True,
    owners: Sequence[Claim] | None = None,
) -> dict[str, Any] | None:
    """Loads the newest state of this job: from the memory of hosts, or the one that `load` finds in `directory` if that
    is newer. All ranks must call it.

    Copies of which a part is lost are not used, and a warning names the part. If a copy turns out to be damaged on
    every host that keeps it, a warning says so, and the state of `directory` is loaded.

    Returns:
        The saved `extra`, as `load` returns it; None if there is nothing to load.

    Raises:
        CheckpointError: on every rank, as for `load`.
    """

    def restore(checkpoint: Checkpoint) -> dict[str, Any]:
        return _restore(Team(), checkpoint, model, optimizer, extra, strict=strict, owners=owners)

    loaded = load_newest(Path(directory), copies, Team(), opening.open_at, restore)
    return None if loaded is None else loaded[1]


def _restore(
    team: Team,
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: Optimizer | None,
    extra: MutableMapping[str, Any] | None,
    *,
    strict: bool,
    owners: Sequence[Claim] | None,
) -> dict[str, Any]:
    doing = f"loading {checkpoint.path}"
    team.together(doing, lambda: checkpoint.check_files(team.rank, team.size))
    sizes = job_names(team, model, optimizer).group_sizes
    team.together(doing, lambda: _check_groups(checkpoint, optimizer, sizes))
    _check_names(team, doing, checkpoint, model, strict=strict)
    owner = team.together(doing, lambda: owner_of(model, optimizer, owners))
    team.together(doing, lambda: owner.load_records(checkpoint))
    saved, group_options, generators = team.together(doing, lambda: _values(checkpoint, team))
    records = owner.records()
    team.together(doing, lambda: _check_read(checkpoint, records, states=optimizer is not None))
    if optimizer is not None:
        options.set_options(optimizer, group_options)
    _restore_extra(extra, saved)
    if generators is not None:
        rng.restore(team.rank, checkpoint.manifest.values[f"rng/{team.rank}"], generators.__getitem__)
    elif checkpoint.manifest.world_size != team.size and team.first:
        warnings.warn(
            f"{checkpoint.path} was written on {checkpoint.manifest.world_size} ranks and is loaded on {team.size}: "
            "random generators belong to ranks, and stay as they are",
            stacklevel=3,
        )
    return saved


def _check_groups(checkpoint: Checkpoint, optimizer: Optimizer | None, sizes: Sequence[int]) -> None:
    """Raises, before anything is changed, if the optimizer does not match the checkpoint. `sizes` are those of its
    groups over all ranks.
    """
    refuse_parts(checkpoint)
    stored = checkpoint.manifest.values.get("optimizer")
    if optimizer is None or not stored:
        if optimizer is not None:
            raise CheckpointError(
                "it contains no optimizer states: pass optimizer=None to load the model alone"
            )
        return
    wanted = [group["num_params"] for group in stored["groups"]]
    if stored["groups"] and list(sizes) != wanted:
        raise CheckpointError(
            f"the optimizer has groups of {list(sizes)} parameters, the checkpoint has groups of {wanted}: create the "
            "same groups in the same order"
        )
    if stored.get("family") and stored["family"] != options.family(optimizer):
        raise CheckpointError(
            f"it contains the states of an optimizer of the family {stored['family']!r}, but this optimizer is "
            "of the family "
            f"{options.family(optimizer)!r}: pass optimizer=None to load the model alone"
        )


def _check_names(team: Team, doing: str, checkpoint: Checkpoint, model: nn.Module, *, strict: bool) -> None:
    """Raises, before anything is changed, if a tensor of the checkpoint is in no rank's model."""
    if not strict:
        return
    mine = [*names.parameters(model), *names.buffers(model)]
    everyone = team.gather(json.dumps(mine).encode())

    def compare() -> None:
        known = {name for part in everyone for name in json.loads(part)}
        unknown = sorted(set(checkpoint.manifest.tensors) - known)
        if team.first and unknown:
            raise CheckpointError(
                f"it has {len(unknown)} tensors that the model lacks, the first are {unknown[:5]}: use the model "
                "it was "
                "written for, or pass strict=False"
            )

    team.together(doing, compare)


def _values(
    checkpoint: Checkpoint, team: Team
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Tensor] | None]:
    """Reads extra, group options, and this rank's random generators if present. Everything is read before any of it
    is used, so that all ranks report damage together.
    """
    values = checkpoint.manifest.values
    saved = codec.decode(values.get("client_state") or {}, checkpoint.blob)
    groups = (values.get("optimizer") or {}).get("groups") or []
    group_options = [codec.decode(group["options"], checkpoint.blob) for group in groups]
    generators = None
    if checkpoint.manifest.world_size == team.size and f"rng/{team.rank}" in values:
        prefix = f"rng/{team.rank}/"
        generators = {
            name: checkpoint.blob(name) for name in checkpoint.manifest.blobs if name.startswith(prefix)
        }
    return saved, group_options, generators


def _check_read(checkpoint: Checkpoint, records: Sequence[Any], *, states: bool) -> None:
    """Raises if data was damaged, or if an element of this rank was not loaded."""
    if checkpoint.problems:
        older = sorted(set(folder.complete(checkpoint.path.parent)) - {checkpoint.manifest.tag})
        there = f"; there are {', '.join(older)}" if older else ""
        raise CheckpointError(
            f"{'; '.join(checkpoint.problems)}. The model is now partly loaded: load another checkpoint with "
            f"tag=...{there}"
        )
    for record in records:
        if record.state not in (PARAM, BUFFER) and not states:
            continue
        end = record.flat_offset + record.data.numel()
        if not checkpoint.was_read(record.fqn, record.state, record.flat_offset, end, record.coordinates):
            raise CheckpointError(
                f"elements {record.flat_offset} to {end} of {record.state} of {record.fqn!r} were not restored"
            )


def _restore_extra(extra: MutableMapping[str, Any] | None, saved: Mapping[str, Any]) -> None:
    if extra is None:
        return
    for key, value in saved.items():
        if _is_stateful(extra.get(key)):
            extra[key].load_state_dict(value)
        else:
            extra[key] = value
    lacking = [key for key, value in extra.items() if _is_stateful(value) and key not in saved]
    if lacking:
        warnings.warn(
            f"the checkpoint has no state for extra[{lacking[0]!r}], which is left unchanged", stacklevel=3
        )
