"""A job that somebody else's scheduler will start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from ds_engine.launch.plan import LaunchError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_NAME_LENGTH = 40
"""Kubernetes appends the role and the number of a pod to the name, and allows 63 characters."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What runs, where, and with which environment."""

    script: str
    """A Python file, or the name of a module."""
    arguments: tuple[str, ...] = ()
    module: bool = False
    """Whether `script` is the name of a module."""
    nodes: int = 1
    """Number of machines."""
    ranks_per_node: int
    """Number of ranks on each machine."""
    gpus_per_node: int
    """Number of GPUs to ask for on each machine; 0 asks for none."""
    environ: Mapping[str, str] = field(default_factory=dict)
    """Variables to set on every rank."""
    folder: str
    """Working directory."""
    python: str = "python"
    """The interpreter."""
    image: str = "IMAGE"
    """Kubernetes: the container image."""

    def __post_init__(self) -> None:
        """Raises LaunchError if no scheduler could start this job."""
        for what, number in (("machine", self.nodes), ("rank on each machine", self.ranks_per_node)):
            if number < 1:
                raise LaunchError(f"{number} is not a number to start with: at least one {what} is required")
        if self.gpus_per_node < 0:
            raise LaunchError(f"{self.gpus_per_node} GPUs: give the number for each machine, or 0 for none")
        wrong = [name for name in self.environ if not _VARIABLE.fullmatch(name)]
        if wrong:
            raise LaunchError(
                f"{wrong[0]!r} is not the name of an environment variable: use letters, digits and underscores"
            )

    @property
    def name(self) -> str:
        """A name that every scheduler accepts, made from that of the script."""
        stem = self.script.rpartition(".")[2] if self.module else PurePath(self.script).stem
        name = re.sub("[^a-z0-9]+", "-", stem.lower())[:_NAME_LENGTH].strip("-")
        return name if name[:1].isalpha() else f"job-{name}".strip("-")

    @property
    def target(self) -> tuple[str, ...]:
        """The arguments of the interpreter."""
        return (*(["-m"] if self.module else []), self.script, *self.arguments)
