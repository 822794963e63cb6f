"""Names of a model of which ranks may have different parts, such as the stages of a pipeline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ds_checkpoint.owners import names
from ds_checkpoint.team import Team


@dataclass(frozen=True, kw_only=True)
class JobNames:
    """The same on all ranks."""

    group_sizes: Sequence[int]
    """For each group of the optimizer its number of parameters, each counted once however many ranks have it."""
    tied: Mapping[str, str]
    """Every further name of a shared parameter -> its first name."""
    frozen: Sequence[str]
    """Names of the parameters that need no gradient."""


def job_names(team: Team, model: nn.Module, optimizer: Optimizer | None) -> JobNames:
    """Joins the names of all ranks. Collective: where all have the same names, as in every job without a pipeline, one
    message of 32 bytes a rank.
    """
    parameters = names.parameters(model)
    known = {id(param): name for name, param in parameters.items()}
    groups = [] if optimizer is None else optimizer.param_groups
    mine: dict[str, Any] = {
        # The shards of a sharded model are no parameters of it: they count by their position.
        "groups": [[known.get(id(p), i) for i, p in enumerate(group["params"])] for group in groups],
        "tied": names.tied(model),
        "frozen": [name for name, param in parameters.items() if not param.requires_grad],
    }
    text = json.dumps(mine).encode()
    if len(set(team.exchange(hashlib.sha256(text).digest()))) == 1:
        return JobNames(**_joined([mine]))
    every = [json.loads(part) for part in team.gather(text)]
    joined = json.loads(team.share(json.dumps(_joined(every)).encode() if team.first else b""))
    return JobNames(**joined)


def _joined(every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    groups: list[set[str | int]] = [set() for _ in range(max(len(part["groups"]) for part in every))]
    for part in every:
        for group, entries in zip(groups, part["groups"], strict=False):
            group.update(entries)
    return {
        "group_sizes": [len(group) for group in groups],
        "tied": {name: first for part in every for name, first in part["tied"].items()},
        "frozen": list(dict.fromkeys(name for part in every for name in part["frozen"])),
    }
