"""The protocols of the objects that the engine uses. `ds_engine.build` makes them from other packages; other
implementations are possible.

For the update the engine calls `torch.optim.Optimizer.step()`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

T = TypeVar("T")

Reading = tuple[str, str, Mapping[str, tuple[int, int]], int, int]
"""What is read from a checkpoint at once: name, state, mesh coordinates, first element, number of elements."""


class World(Protocol):
    """The rank of this process, its device and its backend."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int:
        """Number of this rank on its machine."""

    @property
    def local_size(self) -> int:
        """Number of ranks on this machine."""

    @property
    def device(self) -> torch.device:
        """Device of this rank."""

    @property
    def backend(self) -> str:
        """Backend of torch.distributed, such as "gloo" or "nccl"."""

    @property
    def source(self) -> str:
        """Name of the launcher that started this rank."""

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables from which the rank was read, as NAME=value."""


class Norm(Protocol):
    """Global 2-norm of one step's gradient, without the loss scale."""

    @property
    def before(self) -> float:
        """Before clipping."""

    @property
    def after(self) -> float:
        """After clipping."""


class GradientNorms(Protocol):
    """Measures and clips the norm of the gradient of the next update."""

    def clip(self, max_norm: float) -> None:
        """Scales the gradient so that its global norm is at most `max_norm`; inf only measures it. Collective."""

    def last(self) -> Norm | None:
        """Returns the last measured norm; None before the first one."""


class LossGuard(Protocol):
    """Scales losses, and skips an update whose gradient is not finite."""

    @property
    def loss_scale(self) -> float: ...
    @property
    def step_was_skipped(self) -> bool:
        """Whether the last `optimizer.step()` was skipped."""

    @property
    def culprit(self) -> str | None:
        """Of the parameters whose gradients were not finite in the last step, the one nearest to the loss."""

    def scale(self, loss: Tensor) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class StoredTensor(Protocol):
    """A 1-D tensor whose values are not in memory."""

    dtype: torch.dtype

    def numel(self) -> int: ...
    def element_size(self) -> int: ...
    def load(self) -> Tensor: ...


class Record(Protocol):
    """One contiguous range of one flattened tensor of the training state."""

    @property
    def fqn(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...
    @property
    def flat_offset(self) -> int: ...
    @property
    def data(self) -> Tensor | StoredTensor: ...
    @property
    def coordinates(self) -> Mapping[str, tuple[int, int]]:
        """Index and size of every mesh axis along which the values under this name differ."""


class Shares(Protocol):
    """How the state of a model is divided among the ranks."""

    @property
    def accumulation(self) -> str:
        """When gradients are reduced: "local" at the accumulation boundary, "sharded" in every micro-batch."""

    @property
    def params_numel(self) -> int: ...
    @property
    def trainable_numel(self) -> int: ...
    @property
    def owned_numel(self) -> int:
        """Number of elements whose optimizer states this rank holds, including padding."""

    @property
    def compute_dtypes(self) -> tuple[str, ...]: ...


class HeldBytes(Protocol):
    """Bytes of state that this rank holds now."""

    @property
    def params_bytes(self) -> int: ...
    @property
    def masters_bytes(self) -> int: ...
    @property
    def grads_bytes(self) -> int: ...
    @property
    def optimizer_bytes(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class StateNames:
    """The names of the tensors of a whole model, of which a rank may hold a part."""

    tensors: frozenset[str]
    """Parameters under their first names, and persistent buffers."""
    frozen: tuple[str, ...]
    """Parameters that do not require a gradient."""
    tied: Mapping[str, str]
    """Every further name of a shared parameter -> its first name."""
    groups: tuple[tuple[str, ...], ...]
    """The parameters of each group of the optimizer."""


class ModelState(Protocol):
    """Owns the parameters, gradients and optimizer states of one model."""

    @property
    def divided(self) -> bool:
        """Whether ranks hold shards of the parameters, so that forward is collective."""

    @property
    def backwards(self) -> int:
        """Number of backwards whose gradients wait for the next update."""

    def shares(self) -> Shares: ...
    def held(self) -> HeldBytes: ...

    def records(self) -> Sequence[Record]:
        """Returns every range that this rank owns, for a checkpoint."""

    def group_names(self) -> list[list[str]]:
        """Returns the names of the parameters of each optimizer group, in order."""

    def names(self) -> StateNames:
        """Returns the names of the whole model, the same on all ranks."""

    def load_records(
        self,
        source: Any,
        *,
        optimizer_states: bool = True,
        keep: AbstractSet[str] = frozenset(),
        expect: Callable[[Sequence[Reading]], None] | None = None,
    ) -> None:
        """Loads the values of every range from a checkpoint. Collective.

        Args:
            optimizer_states: load optimizer states, too.
            keep: names of tensors that are not loaded, nor their states.
            expect: called before the first read with what will be read.
        """

    def residuals(self) -> Mapping[str, Any] | None:
        """Returns what this rank has to save besides records: what compression lost. None: nothing."""

    def load_residuals(self, states: Sequence[Mapping[str, Any]]) -> str | None:
        """Loads results of `residuals`: of this rank if as many ranks have saved them, else of all ranks.

        Returns:
            Why they could not be used; None: they are restored.
        """

    def offload(
        self, include: Collection[str] | None, device: str, *, pin_memory: bool, non_blocking: bool
    ) -> None:
        """See `Engine.offload_states`."""

    def reload(self, *, non_blocking: bool) -> None:
        """Moves back what `offload` has moved. No effect if nothing was moved."""

    def offloaded(self) -> frozenset[str]:
        """Kinds of state that `offload` has moved and `reload` has not moved back."""

    def check_replicas(self, step: int) -> None:
        """Raises on every rank, with the number of the step, if ranks hold different bits of replicated values.
        Collective.
        """

    def destroy(self) -> None:
        """Makes the module an ordinary module again, whole on every rank. Collective."""


class KeepsErrors(Protocol):
    """Something that keeps a state of this rank between reductions of gradients."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Loads a state; an empty one begins anew."""


class MovedActivations(Protocol):
    """Moves activations away between forward and backward."""

    statistics: Any
    """Counts of moved and kept tensors and bytes."""

    def close(self) -> None:
        """Moves no more, and frees what it holds."""


class Watch(Protocol):
    """Watches something until `close`."""

    def close(self) -> None:
        """Ends the watch."""


class RecordsCollectives(Protocol):
    """The records of an engine's collectives."""

    def log_summary(self, show_straggler: bool = False) -> Any:
        """Returns what was recorded so far; rank 0 prints it. All ranks must call it."""

    def reset(self) -> None:
        """Forgets what was recorded on this rank."""

    def close(self) -> None:
        """Ends the records."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The objects that own gradients and state of one module."""

    guard: LossGuard
    norms: GradientNorms
    state: ModelState
    activations: MovedActivations | None = None
    """None: activations stay on the device."""
    sparse_attention: SparseAttention | None = None
    """The attention of the section `sparse_attention`, for models that call it themselves; None: there is none."""
    tensor_group: ProcessGroup | None = None
    """The ranks that share each layer; None: layers are whole, or cut by the caller."""
    sequence_group: ProcessGroup | None = None
    """The ranks that process the other tokens of the same samples; None: sequences are not divided."""
    comms_log: RecordsCollectives | None = None
    """The records of collectives, with the section `comms_logger`; None: nothing is recorded."""

    stalls: Watch | None = None
    """Reports ranks that others wait for, with the section `stall_reports`; None: nothing is watched."""

    def close(self) -> None:
        """Frees buffers for activations, and ends the records of collectives and the watch of ranks."""
        if self.stalls is not None:
            self.stalls.close()
        if self.activations is not None:
            self.activations.close()
        if self.comms_log is not None:
            self.comms_log.close()


class RunsPipeline(Protocol):
    """Runs the stages of this rank by their schedule. All methods but `close` are collective."""

    is_first: bool
    """Whether this rank has the first stage, which gets the inputs."""
    is_last: bool
    """Whether this rank has the last stage, which gets the labels."""

    @property
    def num_microbatches(self) -> int:
        """Number of micro-batches of a training step."""

    def set_num_microbatches(self, num_microbatches: int) -> None: ...

    def train(
        self, data: Iterable[Any], loss_weights: Sequence[float] | Callable[[Any], float] | None = None
    ) -> Tensor:
        """Runs forwards and backwards of a step. `data`: pairs (inputs, labels), one for each micro-batch, read on the
        first and the last rank. `loss_weights`: factors of the losses, or a function that returns the weight of a
        micro-batch from its labels. Returns the mean loss over micro-batches and data-parallel ranks, on all ranks.
        """

    def evaluate(
        self, data: Iterable[Any], *, num_microbatches: int, with_loss: bool, keep_outputs: bool
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Runs forwards. Returns the mean loss on all ranks, and on the last rank the output of each micro-batch."""

    def last_group(self) -> tuple[Any, int]:
        """Returns the process group of the pipeline ranks (None: this rank alone), and the global rank of the last."""

    def close(self) -> None:
        """Ends what runs in the background. The pipeline cannot be used afterwards."""


class BackgroundWriter(Protocol):
    """Writes checkpoints while training continues."""

    def save(
        self, root: Path, tag: str, content: Callable[[], Any], *, keep_last: int | None, name_latest: bool
    ) -> str:
        """Starts to write a checkpoint, and returns its path."""

    def wait(self) -> None:
        """Returns when nothing is being written. Collective."""

    def hold(self) -> None:
        """Returns when all training state is copied."""

    def close(self) -> None: ...


@runtime_checkable
class ReducesGradients(Protocol):
    """An optimizer that averages gradients over ranks inside of `step()`; read once, in `initialize`."""

    reduces_gradients: bool


class StepReport(Protocol):
    """What a `ClipsGradients` optimizer did in its last step."""

    @property
    def skipped(self) -> bool:
        """Whether the step changed nothing, because a gradient of some rank was not finite."""

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient, without the loss scale, before clipping."""

    @property
    def clip_factor(self) -> float:
        """What the gradient was multiplied by to clip it."""


@runtime_checkable
class ClipsGradients(ReducesGradients, Protocol):
    """An optimizer that also unscales, measures and clips the gradient inside of `step()`, and skips a step on all
    ranks if a gradient is not finite.
    """

    max_grad_norm: float
    """Maximum norm; 0: no limit."""
    grad_scale: Any
    """The loss scale of the gradients."""

    @property
    def report(self) -> StepReport | None: ...


class SparseAttention(Protocol):
    """Attention of queries (batch, tokens, heads, head_dim) to some blocks of the keys."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        padding: Tensor | None = None,
    ) -> Tensor: ...


class Recompute(Protocol):
    """Calls layers and keeps only their inputs for backward: `h = recompute(layer, h)`."""

    def __call__(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T: ...

    def reset(self) -> None:
        """Resets the statistics."""


class TokenDropper(Protocol):
    """Makes some layers process only a random subset of the tokens."""

    kept: int | None
    """Number of tokens that the layers process; None: all of them."""

    def remove(self) -> None:
        """Makes the layers process all tokens again."""


MakeOptimizer = Callable[[Any], Optimizer]
"""Makes an optimizer from parameters or groups."""
