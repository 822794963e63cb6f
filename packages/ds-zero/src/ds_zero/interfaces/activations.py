"""Activations that are elsewhere between forward and backward, in a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn


class PlannedActivations(Protocol):
    """What was moved while a job was simulated."""

    @property
    def moved_bytes(self) -> int:
        """Bytes of activations that have left the device so far."""

    @property
    def disk_bytes(self) -> int:
        """The most bytes on a disk at one time."""


class PlansActivations(Protocol):
    """Moves the activations of a simulated model as it would move those of a real one."""

    def attach(
        self, model: nn.Module, on_host: Callable[[Tensor], None], *, accelerator: bool
    ) -> PlannedActivations:
        """Moves, from now on, the fake tensors that autograd saves in forwards of `model`.

        Args:
            on_host: is called with each fake tensor that stands for host memory.
            accelerator: whether the fake CPU tensors of the model stand for those of an accelerator.

        Raises:
            ValueError: the model has no such layers.
        """
