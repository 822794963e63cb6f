"""The owner of models that no package claims: ordinary tensors, equal on all ranks, and DTensors (FSDP2)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ds_checkpoint.format.records import BUFFER, PARAM, Record
from ds_checkpoint.interfaces import RecordSource
from ds_checkpoint.owners import names
from ds_checkpoint.owners.placed import Placed, place
from ds_checkpoint.team import Team

MODEL_STATES = frozenset({PARAM, BUFFER})


class PlainOwner:
    """Reads and writes the tensors of the model and the optimizer directly."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """
        Raises:
            ValueError: the model is wrapped by FSDP1, whose parameters do not keep their names.
        """
        if any(type(p).__name__ == "FlatParameter" for p in model.parameters()):
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel, which flattens parameters: use fully_shard "
                "(FSDP2), or torch.distributed.checkpoint"
            )
        self._model = model
        self._optimizer = optimizer

    def records(self) -> Sequence[Record]:
        """Returns the records that this rank writes. Collective: the ranks agree on which of them writes a replicated
        tensor.
        """
        tensors = Team().together("collecting the state", lambda: list(self._tensors()))
        made = [(fqn, state, place(tensor)) for fqn, state, tensor in tensors]
        elsewhere = _written_elsewhere([(f, s) for f, s, placed in made if placed.replicated])
        return [
            Record(fqn, state, placed.shape, placed.flat_offset, placed.data)
            for fqn, state, placed in made
            if placed.writes and (fqn, state) not in elsewhere
        ]

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for fqn, buffer in names.buffers(self._model).items():
            yield fqn, BUFFER, buffer
        for fqn, param in names.parameters(self._model).items():
            yield fqn, PARAM, param
        for fqn, param in self._stepped():
            for state, value in self._state(param).items():
                if value is not None:
                    yield fqn, state, _checked(fqn, state, value, param)

    def _stepped(self) -> list[tuple[str, nn.Parameter]]:
        """Returns the optimizer's parameters with their names, in the order of the model, which all ranks share."""
        if self._optimizer is None:
            return []
        known = names.of_optimizer(self._model, self._optimizer.param_groups)
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return [(known[id(p)], p) for p in names.parameters(self._model).values() if id(p) in held]

    def _state(self, param: nn.Parameter) -> dict[str, Any]:
        assert self._optimizer is not None
        return dict(self._optimizer.state.get(param, {}))

    def load_records(self, source: RecordSource) -> None:
        """Loads every tensor of the model, and every state in `source`. Collective.

        Raises:
            CheckpointError: on every rank, if the source lacks a tensor or has it in another shape. Nothing was
                changed.
        """
        buffers = names.buffers(self._model)
        wanted: list[tuple[str, str, Tensor]] = [
            (n, PARAM, t) for n, t in names.parameters(self._model).items()
        ]
        wanted += [(n, BUFFER, t) for n, t in buffers.items()]
        Team().together("comparing the model with the checkpoint", lambda: _check(wanted, source))
        for fqn, state, tensor in wanted:
            _read(source, fqn, state, place(tensor))
        for fqn, param in self._stepped():
            self._load_states(fqn, param, source)

    def _load_states(self, fqn: str, param: nn.Parameter, source: RecordSource) -> None:
        assert self._optimizer is not None
        stored = {state: kind for state, kind in source.states(fqn).items() if state not in MODEL_STATES}
        held = self._optimizer.state[param]
        for state in held.keys() - stored.keys():
            del held[state]  # a state of this run, which the checkpoint does not contain
        for state, (shape, dtype) in stored.items():
            if tuple(shape) == (tuple(param.shape) or (1,)):
                if not isinstance(held.get(state), Tensor) or held[state].shape != param.shape:
                    held[state] = torch.zeros_like(param, dtype=dtype).detach()
                _read(source, fqn, state, place(held[state]))
            else:
                value = torch.empty(tuple(shape), dtype=dtype, device=self._device_of(state, param))
                _read(source, fqn, state, place(value))
                held[state] = _as_before(held.get(state), value)
        if not held:
            del self._optimizer.state[param]

    def _device_of(self, state: str, param: nn.Parameter) -> torch.device:
        """Step counters are on the host, unless the optimizer's kernel reads them on the device."""
        assert self._optimizer is not None
        group = next(g for g in self._optimizer.param_groups if any(p is param for p in g["params"]))
        on_device = state != "step" or group.get("capturable") or group.get("fused")
        return param.device if on_device else torch.device("cpu")


def _checked(fqn: str, state: str, value: object, param: nn.Parameter) -> Tensor:
    """Returns a state as a tensor to write.

    Raises:
        ValueError: the state cannot be written by logical range.
    """
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"optimizer state {state!r} of parameter {fqn!r} is a {type(value).__name__}: a checkpoint can "
            "contain tensors and numbers"
        )
    if isinstance(param, DTensor) and not isinstance(value, DTensor) and value.ndim > 0:
        raise ValueError(
            f"optimizer state {state!r} of parameter {fqn!r} is an ordinary tensor of shape "
            f"{tuple(value.shape)}, while the parameter is a DTensor: which part of it this rank holds is unknown"
        )
    # The shape distinguishes an element-wise state of a 0-dim parameter from a number.
    return value.view(1) if value.shape == param.shape == () and state != "step" else value


def _as_before(old: object, value: Tensor) -> object:
    """Converts to a number if the optimizer had a number."""
    return type(old)(value.item()) if isinstance(old, (int, float)) else value


def _check(wanted: Sequence[tuple[str, str, Tensor]], source: RecordSource) -> None:
    missing = [fqn for fqn, state, _ in wanted if state not in source.states(fqn)]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of {len(wanted)} tensors of the model, the first are "
            f"{missing[:5]}: it was written for another model"
        )
    for fqn, state, tensor in wanted:
        stored = tuple(source.states(fqn)[state][0])
        if stored != tuple(tensor.shape):
            raise ValueError(
                f"{fqn!r} has shape {tuple(tensor.shape)} in the model and {stored} in the checkpoint: use the "
                "model it was written for"
            )


def _read(source: RecordSource, fqn: str, state: str, placed: Placed) -> None:
    source.read(fqn, state, placed.flat_offset, placed.data)
    placed.put_back()


def _written_elsewhere(mine: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Returns the replicated tensors that another rank writes: the first rank that holds one writes it. Collective."""
    team = Team()
    if team.size == 1:
        return set()
    everyone = team.gather(json.dumps(mine).encode())
    writer: dict[tuple[str, str], int] = {}
    for rank, names_of_rank in enumerate(everyone):
        for fqn, state in json.loads(names_of_rank):
            writer.setdefault((fqn, state), rank)
    # Nearly always rank 0 writes all of them, and nothing is exchanged.
    others = [[fqn, state, rank] for (fqn, state), rank in writer.items() if rank > 0]
    known = {(fqn, state): rank for fqn, state, rank in json.loads(team.share(json.dumps(others).encode()))}
    return {name for name in mine if known.get(name, 0) != team.rank}
