"""Backward in two parts: gradients of a stage's input first, those of its parameters later.

[Note: split backward]
The *main path* is the part of the autograd graph from the outputs of a stage to its inputs. Parameters hang on nodes of
it: the node of `x @ w.T` has one edge to the main path and one to w. The first part runs the main path only, and keeps
the gradient with which each of these nodes was called. The second part calls each node again with this gradient, for
its parameters only. Nothing is computed twice: a node computes only the gradients that are asked for.

This needs every parameter to hang on one node. If a parameter is used twice in a stage, the call of the first node
would run along the main path to the second. Recomputing checkpoints are a single node from outside, or would recompute
once for each call. In these cases `plan` returns None, and the stage computes the whole backward in the first part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_OPAQUE = ("CheckpointFunctionBackward",)


_Pairs = Sequence[tuple[GradientEdge, Tensor | None]]


@dataclass
class SplitBackward:
    """Both parts of one backward."""

    main: _Pairs
    """Outputs that depend on inputs, with their gradients."""
    rest: _Pairs
    """The other outputs."""
    nodes: dict[Node, list[Tensor]]
    """Node of the main path: the parameters that hang on it."""
    captured: dict[Node, tuple[Tensor | None, ...]] = field(default_factory=dict)
    """Node of the main path: the gradients with which the first part called it."""

    def input_gradients(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """First part: returns the gradients of `inputs`."""
        if not self.main or not inputs:
            return [None] * len(inputs)
        handles = [node.register_prehook(self._keep(node)) for node in self.nodes]
        try:
            gradients = torch.autograd.grad(
                [edge for edge, _ in self.main],
                inputs,
                [g for _, g in self.main],
                retain_graph=True,
                allow_unused=True,
            )
        finally:
            for handle in handles:
                handle.remove()
        return list(gradients)

    def _keep(self, node: Node) -> Any:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            self.captured[node] = gradients

        return hook

    def accumulate_weights(self) -> None:
        """Second part: adds the gradients of the parameters to `.grad`."""
        for node, params in self.nodes.items():
            pairs = [
                (GradientEdge(node, i), g) for i, g in enumerate(self.captured.get(node, ())) if g is not None
            ]
            if pairs:
                torch.autograd.backward(
                    [edge for edge, _ in pairs], [g for _, g in pairs], inputs=params, retain_graph=True
                )
        if self.rest:
            torch.autograd.backward([edge for edge, _ in self.rest], [g for _, g in self.rest])
        self.nodes.clear()
        self.captured.clear()
        self.main = self.rest = ()


def plan(pairs: _Pairs, inputs: Sequence[Tensor]) -> SplitBackward | None:
    """Divides the graph below the outputs of a stage; None if that is not possible, [Note: split backward].

    Args:
        pairs: the outputs, with their gradients; None stands for one.
        inputs: the inputs of the stage that need a gradient, leaves of the graph.
    """
    graph = _Graph({id(tensor) for tensor in inputs})
    for edge, _ in pairs:
        graph.visit(edge.node)
    rest = [(edge, g) for edge, g in pairs if not graph.main[edge.node]]
    nodes: dict[Node, list[Tensor]] = {}
    owner: dict[int, Node] = {}
    for node in graph.order:
        if not graph.main[node]:
            continue
        params = [p for next_node, _ in node.next_functions for p in graph.off_path(next_node)]
        if any(owner.setdefault(id(p), node) is not node for p in params):
            return None
        if params:
            nodes[node] = list({id(p): p for p in params}.values())
    if graph.opaque or any(id(p) in owner for edge, _ in rest for p in graph.off_path(edge.node)):
        return None
    main = [(edge, g) for edge, g in pairs if graph.main[edge.node]]
    return SplitBackward(main, rest, nodes)


class _Graph:
    """The nodes below some outputs: which of them lead to an input, and to which parameters."""

    def __init__(self, inputs: set[int]) -> None:
        self._inputs = inputs
        self.order: list[Node] = []
        self.main: dict[Node, bool] = {}
        self._params: dict[Node, tuple[Tensor, ...]] = {}
        self.opaque = False

    def visit(self, root: Node) -> None:
        stack = [(root, False)]
        while stack:
            node, below_done = stack.pop()
            if node in self.main:
                continue
            below = [n for n, _ in node.next_functions if n is not None]
            if not below_done:
                stack.append((node, True))
                stack += [(n, False) for n in below if n not in self.main]
                continue
            variable = getattr(node, "variable", None)
            is_input = variable is not None and id(variable) in self._inputs
            self.main[node] = is_input or any(self.main[n] for n in below)
            own = () if variable is None or is_input else (variable,)
            self._params[node] = (
                *own,
                *_unique(p for n in below if not self.main[n] for p in self._params[n]),
            )
            self.opaque |= node.name().endswith(_OPAQUE)
            self.order.append(node)

    def off_path(self, node: Node | None) -> tuple[Tensor, ...]:
        """The parameters below a node, if it does not lead to an input."""
        return () if node is None or self.main[node] else self._params[node]


def _unique(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple({id(t): t for t in tensors}.values())
