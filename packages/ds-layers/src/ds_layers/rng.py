"""Random streams beside the default one: what model-parallel ranks draw apart, and what they draw alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

MODEL_PARALLEL = "model-parallel-rng"
"""The stream that differs between the ranks of a model-parallel group."""
_MODEL_PARALLEL_OFFSET = 2718  # any constant that keeps it apart from the seeds of data-parallel ranks


class RngTracker:
    """Named random streams for one device, beside its default generator. Outside of `fork`, nothing changes.

    A dropout on activations that all ranks of a model-parallel group hold alike draws from the default
    stream, seeded alike; one on activations that are divided among them draws inside `fork()`, from a stream
    that is seeded apart on every rank.

    Source: Shoeybi et al., Megatron-LM (2019), section "random number generation" of the appendix.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        """`device`: whose generator; default torch's present default device."""
        self.device = torch.device(device) if device is not None else torch.get_default_device()
        self._states: dict[str, Tensor] = {}
        self._seeds: dict[int, str] = {}

    def add(self, name: str, seed: int) -> None:
        """Make a stream that starts from `seed`.

        Raises:
            ValueError: the name or the seed is taken; two streams of one seed would draw the same numbers.
        """
        if name in self._states:
            raise ValueError(f"there is a stream {name!r} already; reset() forgets all of them")
        if seed in self._seeds:
            raise ValueError(f"seed {seed} belongs to the stream {self._seeds[seed]!r}: give another one")
        self._seeds[seed] = name
        with self._default_kept():
            self._seed_default(seed)
            self._states[name] = self._get()

    @contextlib.contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from the stream `name` inside the block; the default stream goes on after it as if nothing
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
        """A copy of where every stream stands."""
        return {name: state.clone() for name, state in self._states.items()}

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Put every stream where `states` says, and forget the others."""
        self._states = {name: state.clone() for name, state in states.items()}
        self._seeds = {seed: name for seed, name in self._seeds.items() if name in states}

    def reset(self) -> None:
        """Forget all streams."""
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
    """Seed the default stream with `seed` on every rank, and the stream `MODEL_PARALLEL` of `tracker` apart
    on each rank of a model-parallel group. Streams that were there before are forgotten.
    """
    tracker.reset()
    torch.manual_seed(seed)
    tracker.add(MODEL_PARALLEL, seed + _MODEL_PARALLEL_OFFSET + model_parallel_rank)
