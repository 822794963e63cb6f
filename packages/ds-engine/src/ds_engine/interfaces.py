"""The roles that the engine talks to. `ds_engine.build` fills them from other packages; anything else may.

The update itself is `torch.optim.Optimizer`'s role: the engine calls `optimizer.step()`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

T = TypeVar("T")

Reading = tuple[str, str, Mapping[str, tuple[int, int]], int, int]
"""What is read from a checkpoint at once: name, state, mesh coordinates, first element, number of elements."""


class World(Protocol):
    """All ranks of the job, seen from this one."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int:
        """Number of this rank among those of its machine."""

    @property
    def local_size(self) -> int:
        """Number of ranks on this machine."""

    @property
    def device(self) -> torch.device:
        """What this rank computes on."""

    @property
    def backend(self) -> str:
        """What moves data between ranks, such as "gloo" or "nccl"."""

    @property
    def source(self) -> str:
        """Which launcher placed this rank."""


class Norm(Protocol):
    """Global 2-norm of one step's gradient, without the loss scale."""

    @property
    def before(self) -> float:
        """Before clipping."""

    @property
    def after(self) -> float:
        """After clipping."""


class GradientNorms(Protocol):
    """Answers for the norm of the gradient that the next update uses."""

    def clip(self, max_norm: float) -> None:
        """Scale the gradient so that its global norm is at most `max_norm`; inf measures it only. Collective."""

    def last(self) -> Norm | None:
        """The norm that was measured last; None before the first one."""


class LossGuard(Protocol):
    """Scales losses, and leaves out an update whose gradient is not finite."""

    @property
    def loss_scale(self) -> float: ...
    @property
    def step_was_skipped(self) -> bool:
        """Whether the last `optimizer.step()` left the parameters as they were."""

    @property
    def culprit(self) -> str | None:
        """The parameter nearest to the loss whose gradient was not finite in the last step."""

    def scale(self, loss: Tensor) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class Record(Protocol):
    """One contiguous piece of one tensor of the training state."""

    @property
    def fqn(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...
    @property
    def flat_offset(self) -> int: ...
    @property
    def data(self) -> Tensor: ...
    @property
    def coordinates(self) -> Mapping[str, tuple[int, int]]:
        """Index and size of every mesh axis along which the values under this name differ."""


class Shares(Protocol):
    """How the state of a model is divided among ranks."""

    @property
    def accumulation(self) -> str:
        """When micro-batches are reduced: "local" at the boundary, "sharded" each."""

    @property
    def params_numel(self) -> int: ...
    @property
    def trainable_numel(self) -> int: ...
    @property
    def owned_numel(self) -> int:
        """Elements whose optimizer states this rank holds, padding included."""

    @property
    def compute_dtypes(self) -> tuple[str, ...]: ...


class HeldBytes(Protocol):
    """Bytes of the state that this rank holds now."""

    @property
    def params_bytes(self) -> int: ...
    @property
    def masters_bytes(self) -> int: ...
    @property
    def grads_bytes(self) -> int: ...
    @property
    def optimizer_bytes(self) -> int: ...


class ModelState(Protocol):
    """Owns the parameters, gradients and optimizer states of one model."""

    @property
    def divided(self) -> bool:
        """Whether ranks hold slices of the parameters, so that forward is collective."""

    @property
    def backwards(self) -> int:
        """Number of backwards whose gradients wait for the next update."""

    def shares(self) -> Shares: ...
    def held(self) -> HeldBytes: ...

    def records(self) -> Sequence[Record]:
        """Every piece that this rank owns, for a checkpoint."""

    def group_names(self) -> list[list[str]]:
        """Names of the parameters of each optimizer group, in its order."""

    def load_records(
        self,
        source: Any,
        *,
        optimizer_states: bool = True,
        keep: AbstractSet[str] = frozenset(),
        expect: Callable[[Sequence[Reading]], None] | None = None,
    ) -> None:
        """Take the values of every piece from a checkpoint. Collective.

        Args:
            optimizer_states: read those too.
            keep: names of tensors that stay as they are, with their states.
            expect: called before the first read with what will be read.
        """

    def offload(
        self, include: Collection[str] | None, device: str, *, pin_memory: bool, non_blocking: bool
    ) -> None:
        """See `Engine.offload_states`."""

    def reload(self, *, non_blocking: bool) -> None:
        """Bring back what `offload` moved; no effect where nothing was."""

    def offloaded(self) -> frozenset[str]:
        """Kinds of state that `offload` has moved and `reload` has not brought back."""

    def destroy(self) -> None:
        """Give the module back, whole and ordinary. Collective."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Who answers for gradients and state of one module."""

    guard: LossGuard
    norms: GradientNorms
    state: ModelState


class BackgroundWriter(Protocol):
    """Writes checkpoints beside training."""

    def save(
        self, root: Path, tag: str, content: Callable[[], Any], *, keep_last: int | None, name_latest: bool
    ) -> str:
        """Begin to write a checkpoint; returns its path."""

    def wait(self) -> None:
        """Return when nothing is being written. Collective."""

    def hold(self) -> None:
        """Return when nothing of the training state is still to be copied."""

    def close(self) -> None: ...


@runtime_checkable
class ReducesGradients(Protocol):
    """An optimizer that averages gradients over ranks inside of `step()`; read once, at assembly."""

    reduces_gradients: bool


class Recompute(Protocol):
    """Calls layers so that only their inputs are kept for backward: `h = recompute(layer, h)`."""

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T: ...

    def reset(self) -> None:
        """Start the statistics anew."""


class TokenDropper(Protocol):
    """Lets some layers see a random part of the tokens."""

    kept: int | None
    """Number of tokens that the layers see; None: all of them."""

    def remove(self) -> None:
        """The layers see all tokens again."""


MakeOptimizer = Callable[[Any], Optimizer]
"""From parameters or groups to an optimizer."""
