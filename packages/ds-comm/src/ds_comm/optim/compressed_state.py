"""The buffers of the compressed phase: what is sent, as one buffer for all parameters, and the residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_comm.compress.feedback import ErrorFeedback, check_owner
from ds_comm.exchange.channel import Channel
from ds_comm.exchange.compressed import CompressedAllReduce
from ds_comm.optim.flat import FlatLayout
from ds_comm.optim.options import CompressionOptions


class CompressedState:
    """A buffer with one range for each parameter of the compressed phase, and its compressed all-reduce."""

    def __init__(self, channel: Channel, options: CompressionOptions) -> None:
        self._channel = channel
        self._options = options
        self._members: tuple[int, ...] = ()
        self._layout: FlatLayout | None = None
        self._loaded: Mapping[str, Any] | None = None
        self.buffer: Tensor | None = None
        """fp32: what is sent. Ranges of parameters are in the order of `update`."""
        self.reduce: CompressedAllReduce | None = None
        """Averages the buffer over ranks; None before the compressed phase."""

    @property
    def feedback(self) -> ErrorFeedback | None:
        """The residuals; None before the compressed phase."""
        return None if self.reduce is None else self.reduce.feedback

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in a compressed all-reduce, by formula."""
        return 0 if self.reduce is None else self.reduce.wire_bytes()

    def update(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """Returns each parameter's range of the buffer, in its shape. A parameter that was not in the buffer gets the
        values given; one that was keeps its range and its residuals.

        Collective when the parameters change: the server residual is divided anew.
        """
        members = tuple(id(param) for param in params)
        if members == self._members and self._layout is not None and self.buffer is not None:
            return self._layout.views(self.buffer)
        layout = FlatLayout(params, self._options.compressor.block_numel)
        buffer = torch.zeros(layout.blocks.numel, dtype=torch.float32, device=params[0].device)
        for view, value in zip(layout.views(buffer), values, strict=True):
            view.copy_(value)
        feedback = ErrorFeedback(
            self._options.compressor,
            layout.blocks,
            rank=self._channel.rank,
            world_size=self._channel.world_size,
            device=buffer.device,
            dtype=self._options.residual_dtype,
        )
        if self._loaded is not None:
            feedback.load_state_dict(self._loaded)
            self._loaded = None
        elif self._layout is not None:
            self._carry_over(members, layout, feedback)
        self._members, self._layout, self.buffer = members, layout, buffer
        self.reduce = CompressedAllReduce(self._channel, feedback)
        return layout.views(buffer)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns each parameter's range of a tensor of the buffer's size, in its shape."""
        assert self._layout is not None
        return self._layout.views(buffer)

    def _carry_over(self, members: Sequence[int], layout: FlatLayout, feedback: ErrorFeedback) -> None:
        """Copies the residuals of parameters that stay."""
        assert self._layout is not None
        old, server = self.feedback, self._whole_server()
        assert old is not None
        new_server = torch.zeros(feedback.numel, dtype=torch.float32, device=server.device)
        rows = {member: row for row, member in enumerate(self._members)}
        pairs = [(rows[member], row) for row, member in enumerate(members) if member in rows]
        for source, target in ((old.worker, feedback.worker), (server, new_server)):
            before, after = self._layout.views(source), layout.views(target)
            for i, j in pairs:
                after[j].copy_(before[i])
        start = feedback.server_start
        feedback.server.copy_(new_server[start : start + feedback.server.numel()])

    def _whole_server(self) -> Tensor:
        feedback = self.feedback
        assert feedback is not None
        whole = torch.zeros(feedback.numel, dtype=torch.float32, device=feedback.server.device)
        whole[feedback.server_start : feedback.server_start + feedback.server.numel()] = feedback.server
        self._channel.all_reduce(whole).wait()
        return whole

    def state_dict(self) -> dict[str, Any] | None:
        """Returns this rank's residuals; None before the compressed phase."""
        if self._loaded is not None:
            return dict(self._loaded)
        return None if self.feedback is None else self.feedback.state_dict()

    def whole_state_dict(self) -> dict[str, Any] | None:
        """Collective. Returns residuals that load on any number of ranks; None before the compressed phase."""
        if self._loaded is not None and self._loaded["form"] == "whole":
            return dict(self._loaded)
        feedback = self.feedback
        if feedback is None:
            return None
        worker = feedback.worker.to(torch.float32, copy=True)
        self._channel.all_reduce(worker).wait()
        return {
            "form": "whole",
            "world_size": self._channel.world_size,
            "numel": feedback.numel,
            "worker": worker / self._channel.world_size,
            "server": self._whole_server(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes residuals, which are used as soon as the parameters of the compressed phase are known: in the next
        step.
        """
        if state is not None:
            check_owner(state, self._channel.rank, self._channel.world_size)
        self._members, self._layout, self.buffer, self.reduce = (), None, None, None
        self._loaded = state
