"""Named random number streams, for numbers that differ between model-parallel ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

MODEL_PARALLEL = "model-parallel-rng"
"""The stream that differs between the ranks of a model-parallel group."""
_MODEL_PARALLEL_OFFSET = 2718  # any constant that avoids the seeds of data-parallel ranks


class RngTracker:
    """Named random number streams for one device, in addition to its default generator. Outside of `fork` it has no
    effect.

    Dropout on activations that all ranks of a model-parallel group hold draws from the default stream, which has the
    same seed on all of them. Dropout on activations that are divided among the ranks draws inside `fork()`, from a
    stream with a different seed on each rank.

    Source: Shoeybi et al., Megatron-LM (2019), section "random number generation" of the appendix.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        """`device`: device of the generator; default torch's current default device."""
        self.device = torch.device(device) if device is not None else torch.get_default_device()
        self._states: dict[str, Tensor] = {}
        self._seeds: dict[int, str] = {}

    def add(self, name: str, seed: int) -> None:
        """Adds a stream that starts from `seed`.

        Raises:
            ValueError: the name or the seed is taken. Two streams with one seed would draw the same numbers.
        """
        if name in self._states:
            raise ValueError(
                f"there is a stream {name!r} already; choose another name, or call reset() to "
                "remove all streams"
            )
        if seed in self._seeds:
            raise ValueError(f"seed {seed} is used by the stream {self._seeds[seed]!r}: choose another seed")
        self._seeds[seed] = name
        with self._default_kept():
            self._seed_default(seed)
            self._states[name] = self._get()

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draws from the stream `name` inside the block. After the block the default stream continues as if nothing
        had been drawn.

        Raises:
            ValueError: there is no such stream.
        """
        if name not in self._states:
            raise ValueError(f"there is no stream {name!r}, only {sorted(self._states)}: add({name!r}, seed)")
        with self._default_kept():
            self._set(self._states[name])
            try:
                yield
            finally:
                self._states[name] = self._get()

    def states(self) -> dict[str, Tensor]:
        """Returns a copy of the state of every stream."""
        return {name: state.clone() for name, state in self._states.items()}

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Restores the streams in `states`, and removes all others."""
        self._states = {name: state.clone() for name, state in states.items()}
        self._seeds = {seed: name for seed, name in self._seeds.items() if name in states}

    def reset(self) -> None:
        """Removes all streams."""
        self._states.clear()
        self._seeds.clear()

    @contextlib.contextmanager
    def _default_kept(self) -> Iterator[None]:
        before = self._get()
        try:
            yield
        finally:
            self._set(before)

    def _seed_default(self, seed: int) -> None:
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.get_device_module(self.device).manual_seed(seed)

    def _get(self) -> Tensor:
        if self.device.type == "cpu":
            return torch.get_rng_state()
        state: Tensor = torch.get_device_module(self.device).get_rng_state(self.device)
        return state

    def _set(self, state: Tensor) -> None:
        if self.device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self.device).set_rng_state(state, self.device)


def model_parallel_seed(tracker: RngTracker, seed: int, model_parallel_rank: int) -> None:
    """Seeds the default stream with `seed` on every rank, and the stream `MODEL_PARALLEL` of `tracker` with a
    different seed on each model-parallel rank. All earlier streams of `tracker` are removed.
    """
    tracker.reset()
    torch.manual_seed(seed)
    tracker.add(MODEL_PARALLEL, seed + _MODEL_PARALLEL_OFFSET + model_parallel_rank)
