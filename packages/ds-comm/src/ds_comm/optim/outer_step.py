"""The outer step of local methods: from parameters that differ between ranks to new ones that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_comm.compress.blocks import ALIGNMENT, Blocks
from ds_comm.compress.feedback import ErrorFeedback, merge_feedback_states
from ds_comm.exchange import wire
from ds_comm.exchange.channel import Channel
from ds_comm.exchange.compressed import CompressedAllReduce
from ds_comm.optim.flat import FlatLayout
from ds_comm.optim.options import CompressionOptions


class OuterStep:
    """Anchors, the outer optimizer over them, and the residuals of compressed outer gradients.

    Anchors lie in one buffer, so an outer step has one collective, two with compression, and one of a few bytes.
    """

    def __init__(
        self,
        channel: Channel,
        outer: Callable[[list[Tensor]], Optimizer],
        compression: CompressionOptions | None,
    ) -> None:
        self._channel = channel
        self._make_outer = outer
        self._compression = compression
        self._members: list[Tensor] = []
        self._layout: FlatLayout | None = None
        self._anchors: Tensor | None = None
        self._views: list[Tensor] = []  # the anchors in the shapes of the parameters
        self._outer: Optimizer | None = None
        self._reduce: CompressedAllReduce | None = None

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in an outer step, without the flags; 0 before there are parameters."""
        if self._anchors is None or self._channel.world_size == 1:
            return 0
        if self._reduce is not None:
            return self._reduce.wire_bytes()
        return wire.all_reduce_bytes(self._anchors.nbytes, self._channel.world_size)

    def forget(self) -> None:
        """Forgets anchors, outer states and residuals."""
        self._members, self._views = [], []
        self._layout, self._anchors, self._outer, self._reduce = None, None, None, None

    def begin(self, params: Sequence[Tensor]) -> None:
        """Takes the anchors of parameters that all ranks have. Collective if the parameters are others than before:
        then all get the values of the first rank.
        """
        if not params:
            raise ValueError("LocalSGD: no parameter requires a gradient")
        if len(params) != len(self._members) or any(
            p is not q for p, q in zip(params, self._members, strict=False)
        ):
            self._adopt(params)
            assert self._anchors is not None
            self._channel.broadcast(self._anchors)
            for param, anchor in zip(params, self._views, strict=True):
                param.detach().copy_(anchor)
            return
        for param, anchor in zip(params, self._views, strict=True):
            # An anchor of a 16-bit parameter has more bits than it: it stays, unless somebody wrote the parameter.
            if not torch.equal(param.detach(), anchor.to(param.dtype)):
                anchor.copy_(param.detach())

    def _adopt(self, params: Sequence[Tensor]) -> None:
        """Makes the buffer of these parameters. Outer states and worker residuals of those that stay are kept."""
        old_outer, old_reduce, old_layout = self._outer, self._reduce, self._layout
        old_views = {id(p): view for p, view in zip(self._members, self._views, strict=True)}
        width = ALIGNMENT if self._compression is None else self._compression.compressor.block_numel
        layout = FlatLayout(params, width)
        self._anchors = torch.zeros(layout.blocks.numel, dtype=torch.float32, device=params[0].device)
        self._layout, self._views = layout, layout.views(self._anchors)
        self._outer = self._make_outer(list(self._views))
        for param, anchor in zip(params, self._views, strict=True):
            anchor.copy_(param.detach())
            if old_outer is not None and id(param) in old_views and old_views[id(param)] in old_outer.state:
                self._outer.state[anchor] = old_outer.state[old_views[id(param)]]
        if self._compression is not None:
            self._reduce = self._reduction(self._compression, layout, self._anchors.device)
            if old_reduce is not None and old_layout is not None:
                # The server residual is divided in another way now, and begins anew.
                old = zip(self._members, old_layout.views(old_reduce.feedback.worker), strict=True)
                rows = {id(p): view for p, view in old}
                for param, view in zip(params, layout.views(self._reduce.feedback.worker), strict=True):
                    if id(param) in rows:
                        view.copy_(rows[id(param)])
        self._members = list(params)

    def _reduction(
        self, options: CompressionOptions, layout: FlatLayout, device: torch.device
    ) -> CompressedAllReduce:
        feedback = ErrorFeedback(
            options.compressor,
            layout.blocks,
            rank=self._channel.rank,
            world_size=self._channel.world_size,
            device=device,
            dtype=options.residual_dtype,
        )
        return CompressedAllReduce(self._channel, feedback)

    def __call__(self, params: Sequence[Tensor], alone: int) -> None:
        """The outer step after `alone` local ones. Collective.

        Raises FloatingPointError on every rank if the parameters of one are not finite.
        """
        assert self._layout is not None and self._anchors is not None and self._outer is not None
        anchors = self._views
        change = torch.zeros_like(self._anchors)
        changes = self._layout.views(change)
        for param, anchor, view in zip(params, anchors, changes, strict=True):
            torch.sub(anchor, param.detach(), out=view)
        self._check_finite(change, alone)
        if self._reduce is not None:
            self._reduce(change)
        else:
            self._channel.all_reduce(change).wait()
            change.div_(self._channel.world_size)
        for anchor, view in zip(anchors, changes, strict=True):
            anchor.grad = view
        self._outer.step()
        for param, anchor in zip(params, anchors, strict=True):
            anchor.grad = None
            param.detach().copy_(anchor)

    def _check_finite(self, change: Tensor, alone: int) -> None:
        flags = torch.zeros(self._channel.world_size, device=change.device)
        flags[self._channel.rank] = float(not bool(torch.isfinite(change.sum())))
        self._channel.all_reduce(flags).wait()
        if flags.any():
            raise FloatingPointError(
                f"LocalSGD: after {alone} local steps the parameters of rank(s) {flags.nonzero().flatten().tolist()} "
                f"are not finite; nothing was averaged. Lower the inner learning rate or clip gradients "
                f"(max_grad_norm), and go on from the last checkpoint"
            )

    # -- states

    def state_dict(self) -> dict[str, Any]:
        """Returns anchors, states of the outer optimizer in order of the parameters, residuals; without copies."""
        if self._outer is None:
            return {"anchors": None, "outer": [], "feedback": None}
        return {
            "anchors": self._anchors,
            "outer": [dict(self._outer.state.get(view, {})) for view in self._views],
            "feedback": None if self._reduce is None else self._reduce.feedback.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], params: Sequence[Tensor]) -> None:
        """Loads `state_dict()`."""
        self.forget()
        if state["anchors"] is None:
            return
        self._adopt(params)
        assert self._anchors is not None and self._outer is not None
        if state["anchors"].numel() != self._anchors.numel():
            raise ValueError(
                f"LocalSGD: the saved anchors have {state['anchors'].numel()} elements, but these parameters need "
                f"{self._anchors.numel()}; use the model and the compression with which they were saved"
            )
        self._anchors.copy_(state["anchors"])
        for view, values in zip(self._views, state["outer"], strict=True):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    moved = value.to(view.device) if value.dim() else value
                    self._outer.state[view][name] = moved.clone()
                else:
                    self._outer.state[view][name] = value
        if self._reduce is not None and state["feedback"] is not None:
            self._reduce.feedback.load_state_dict(state["feedback"])

    @staticmethod
    def merged_feedback(states: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The residuals of all ranks as one state; None: there are none."""
        feedback = [state["feedback"] for state in states]
        return None if any(each is None for each in feedback) else merge_feedback_states(feedback)

    # -- plans

    def planned_states(self, num_ranks: int) -> dict[str, tuple[torch.dtype, float]]:
        """As `PlansStates.planned_states` of ds_zero: with the momentum of an outer SGD."""
        states = {"anchor": (torch.float32, 1.0), "outer_momentum": (torch.float32, 1.0)}
        if self._compression is not None:
            dtype = self._compression.residual_dtype
            states |= {"worker_residual": (dtype, 1.0), "server_residual": (dtype, 1.0 / num_ranks)}
        return states

    def planned_bytes(self, numels: Sequence[int], num_ranks: int) -> int:
        """Bytes that rank 0 of so many ranks sends in an outer step."""
        if self._compression is None:
            blocks, _ = Blocks.of(numels, ALIGNMENT)
            return wire.all_reduce_bytes(blocks.numel * 4, num_ranks)
        compressor = self._compression.compressor
        blocks, _ = Blocks.of(numels, compressor.block_numel)
        parts = [compressor.payload_bytes(part) for _, part in blocks.cut(num_ranks)]
        return wire.two_phase_bytes(parts, 0)
