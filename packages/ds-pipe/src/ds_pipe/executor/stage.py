"""One stage: forwards and backwards of its micro-batches, without communication."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ds_pipe.executor.split_backward import SplitBackward, plan
from ds_pipe.executor.values import as_leaves, take_apart
from ds_pipe.interfaces import ReducesGradients, Shardable

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """Options of a stage."""

    split_backward: bool = True
    """Compute a backward in two parts if the schedule asks for it and autograd allows it. False: the first part
    computes all of it. Recomputing activation checkpoints need False."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Makes a context around every forward, and around the loss function; for example `torch.autocast`."""


@dataclass
class _Pending:
    """What a micro-batch keeps between forward and backward."""

    inputs: list[Tensor]
    """The tensors of the input, leaves of the graph."""
    edges: list[GradientEdge | None]
    """For every tensor of the output where its gradient enters the graph; None if it needs none."""
    seed: Tensor | None = None
    """The gradient of a loss with respect to itself; None: the output is not a loss."""
    split: SplitBackward | None = None


@dataclass
class Stage:
    """One stage of the model on this rank."""

    module: Callable[[Any], Any]
    """Called with the value of the previous stage; for the first stage, with the inputs of a micro-batch."""
    index: int
    """Index of the stage."""
    loss_fn: LossFn | None = None
    """Of the last stage: called with its output and the targets of the micro-batch. None: the output is the loss."""
    shardable: Shardable | None = None
    """Control of its parameters, if they are divided among data-parallel ranks."""
    options: StageOptions = field(default_factory=StageOptions)
    """Its options."""
    split_refusal: str = field(default="", init=False)
    """Why its backwards are not computed in two parts although the schedule asks for it; empty if they are."""
    _pending: dict[int, _Pending] = field(default_factory=dict, init=False)
    _seed: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.options.split_backward:
            self.split_refusal = "options.split_backward is off"
        elif self.shardable is not None and not isinstance(self.shardable, ReducesGradients):
            self.split_refusal = "sharded parameters are dropped and reduced by whole backwards"

    def compute(self, value: Any) -> Any:
        """Computes an output, and keeps nothing for a backward."""
        with self.options.around():
            return self.module(value)

    def forward(self, microbatch: int, value: Any) -> Any:
        """Computes the output of a micro-batch, and keeps what backward needs."""
        with_grad = torch.is_grad_enabled()
        value, inputs = as_leaves(value) if self.index else (value, [])
        output = self.compute(value)
        if with_grad:
            self.keep(microbatch, inputs, output)
        return output

    def keep(self, microbatch: int, inputs: list[Tensor], output: Any) -> None:
        """Keeps where the gradients of an output enter the graph, but not the output itself."""
        _, tensors = take_apart(output)
        edges = [get_gradient_edge(t) if t.requires_grad else None for t in tensors]
        self._pending[microbatch] = _Pending(inputs, edges)

    def last_forward(
        self, microbatch: int, value: Any, target: Any, weigh: Callable[[Tensor], Tensor]
    ) -> tuple[Any, Tensor | None]:
        """Computes output and loss of the last stage. Backward begins at `weigh(loss)`."""
        value, inputs = as_leaves(value) if self.index else (value, [])
        with self.options.around():
            output = self.module(value)
            loss = output if self.loss_fn is None else self.loss_fn(output, target)
        if torch.is_grad_enabled():
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(
                    "the loss of the last stage has to be a tensor of one element, got "
                    f"{_described(loss)}; pass loss_fn"
                )
            weighed = weigh(loss)
            self.keep(microbatch, inputs, weighed)
            self._pending[microbatch].seed = self._one(weighed)
        return output, loss if isinstance(loss, Tensor) else None

    def _one(self, loss: Tensor) -> Tensor:
        """One, in the shape of a loss: autograd would make it anew for each micro-batch."""
        kept = self._seed
        if kept is None or (kept.shape, kept.dtype, kept.device) != (loss.shape, loss.dtype, loss.device):
            kept = self._seed = torch.ones_like(loss, requires_grad=False)
        return kept

    def backward(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Computes the whole backward; returns the gradients of all tensors of the input, None where there is none."""
        pending = self._pending.pop(microbatch)
        pairs = _pairs(pending, gradients)
        if pairs:
            torch.autograd.backward([edge for edge, _ in pairs], [g for _, g in pairs])
        return [tensor.grad for tensor in pending.inputs]

    def backward_input(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Computes the gradients of the input; if autograd does not allow to split, those of the parameters too."""
        pending = self._pending[microbatch]
        pairs = _pairs(pending, gradients)
        wanted = [tensor for tensor in pending.inputs if tensor.requires_grad]
        split = None if self.split_refusal else plan(pairs, wanted)
        if split is None:
            if not self.split_refusal:
                self._refuse("a parameter is used twice in this stage, or recomputed by a checkpoint")
            result = self.backward(microbatch, gradients)
            self._pending[microbatch] = _Pending([], [])
            return result
        pending.split = split
        found = iter(split.input_gradients(wanted))
        return [next(found) if tensor.requires_grad else None for tensor in pending.inputs]

    def _refuse(self, reason: str) -> None:
        self.split_refusal = reason
        warnings.warn(
            f"stage {self.index}: backward is not split ({reason}): its first part computes all of it, so that bubbles "
            "are those of a schedule with whole backwards",
            stacklevel=2,
        )

    def backward_weight(self, microbatch: int) -> None:
        """Computes the gradients of the parameters."""
        split = self._pending.pop(microbatch).split
        if split is not None:
            split.accumulate_weights()

    def forget(self) -> None:
        """Drops all that micro-batches keep."""
        self._pending.clear()

    @property
    def num_kept(self) -> int:
        """Number of micro-batches that keep activations."""
        return len(self._pending)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the module."""
        return list(self.module.parameters()) if isinstance(self.module, nn.Module) else []


def _pairs(pending: _Pending, gradients: Sequence[Tensor | None]) -> list[tuple[GradientEdge, Tensor | None]]:
    """Edges with their gradients. A loss has no gradient from outside."""
    if len(gradients) != len(pending.edges):
        raise ValueError(f"{len(gradients)} gradients for {len(pending.edges)} tensors of the stage's output")
    if pending.seed is not None:
        gradients = [pending.seed]
    return [
        (edge, g)
        for edge, g in zip(pending.edges, gradients, strict=True)
        if edge is not None and g is not None
    ]


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
