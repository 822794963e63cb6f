"""`ModelState` of a pipeline model: its names and records are those of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.optim import Optimizer

import ds_zero
from ds_engine.build import self_reducing
from ds_engine.build.pipeline.place import Placed
from ds_engine.build.zero import ZeroState, gathered
from ds_engine.interfaces import KeepsErrors, Roles, StateNames

_TIED = "tied_modules."


class PipelineState(ZeroState):
    """`ModelState` of the stages of one rank; names and group sizes are those of the whole model."""

    def __init__(self, placed: Placed, optimizer: Optimizer, errors: KeepsErrors | None = None) -> None:
        super().__init__(placed.module, optimizer, errors)
        self._placed = placed
        self._whole = self._gathered(super().names())
        stage = placed.module.stage_id
        self._elsewhere = tuple(
            f"{_TIED}{name.removeprefix(_TIED).partition('.')[0]}."
            for name, ranks, _ in placed.module.tied_parameters()
            if ranks[0] != stage
        )

    def names(self) -> StateNames:
        return self._whole

    def records(self) -> Sequence[ds_zero.ShardRecord]:
        # The parameters of tied layers are divided among all ranks that have them, but each has the buffers.
        return [r for r in super().records() if r.state != "buffer" or not r.fqn.startswith(self._elsewhere)]

    def _gathered(self, own: StateNames) -> StateNames:
        group = self._placed.groups.pipe
        if group is None or group.size() == 1:
            return own
        every: list[StateNames] = gathered(own, group.size(), group)
        tied: dict[str, str] = {}
        for names in every:
            tied |= names.tied
        return StateNames(
            tensors=frozenset().union(*(names.tensors for names in every)),
            frozen=tuple(sorted({name for names in every for name in names.frozen})),
            tied=tied,
            groups=tuple(
                tuple(sorted({name for group in groups for name in group}))
                for groups in zip(*(names.groups for names in every), strict=True)
            ),
        )


def with_state(roles: Roles, placed: Placed, optimizer: Optimizer) -> Roles:
    """Returns the roles with the state of a pipeline model. Collective."""
    if isinstance(optimizer, self_reducing.HasModelParts):
        optimizer.share_norms(placed.groups.model if placed.topology.model.size > 1 else None)
    assert isinstance(roles.state, ZeroState)
    return replace(roles, state=PipelineState(placed, optimizer, roles.state.errors))
