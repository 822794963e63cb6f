"""Notices gradients that came from another backward than those of the engine."""

from __future__ import annotations

import warnings

from torch import Tensor

from ds_engine.interfaces import ModelState


class OwnBackwards:
    """Knows which backwards of a micro-batch began at a loss that the engine has scaled.

    It warns instead of refusing, since code that passes gradients on by itself (a loss in chunks, whose last part is
    `hidden.backward(gradient)`) is right, and looks the same from here.
    """

    def __init__(self, state: ModelState) -> None:
        self._state = state
        self._own: set[int] = set()
        """Their numbers, counted as `ModelState.backwards` counts."""
        self._warned = False

    def mark(self, scaled: Tensor) -> Tensor:
        """The same loss; a backward from it is the engine's."""
        if scaled.requires_grad:
            scaled.register_hook(self._begun)
        return scaled

    def check(self) -> None:
        """Warn once if another backward has added to the gradients that wait for the next step."""
        others = set(range(1, self._state.backwards + 1)) - self._own
        if others and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(others)} of {self._state.backwards} backwards since the last step did not begin at a loss of "
                "the engine, so their gradients are neither divided by gradient_accumulation_steps nor multiplied by "
                "the loss scale: call engine.backward(loss), or engine.scale(loss).backward(), for every loss",
                stacklevel=3,
            )

    def forget(self) -> None:
        """The gradients have been used."""
        self._own.clear()

    def _begun(self, _: Tensor) -> None:
        self._own.add(self._state.backwards + 1)
