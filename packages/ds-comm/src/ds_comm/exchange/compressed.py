"""The two-phase compressed all-reduce."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ds_comm.compress.feedback import ErrorFeedback
from ds_comm.exchange import wire
from ds_comm.exchange.channel import Chain, Channel, Done, Work


class CompressedAllReduce:
    """Averages a buffer over ranks while only payloads of a compressor are sent (Tang et al. 2021, algorithm 1).

    1. Each rank encodes its values plus its worker residual, and sends each part to the rank that owns it.
    2. The owner decodes all payloads of its part, averages them in order of rank, adds its server residual, encodes the
       result, and sends it to all ranks.

    All ranks decode the same payloads, so they get the same bits. There are two collectives whatever the number of
    tensors in the buffer. A single rank sends nothing and loses nothing: its residuals are added and become zero.
    """

    def __init__(self, channel: Channel, feedback: ErrorFeedback) -> None:
        """Args:
        channel: the process group.
        feedback: residuals, compressor and parts, of the rank and size of the channel.
        """
        if (channel.rank, channel.world_size) != (feedback.rank, feedback.world_size):
            raise ValueError(
                f"the residuals are those of rank {feedback.rank} of {feedback.world_size}, but the channel is that of "
                f"rank {channel.rank} of {channel.world_size}; make an ErrorFeedback for this group"
            )
        self.channel = channel
        self.feedback = feedback
        self._calls = 0
        compressor = feedback.compressor
        self.part_bytes = [compressor.payload_bytes(part) for _, part in feedback.parts]
        """Bytes of the payload of each part."""

    def wire_bytes(self) -> int:
        """Returns the bytes that this rank sends in a call, by formula."""
        return 0 if self.channel.world_size == 1 else wire.two_phase_bytes(self.part_bytes, self.channel.rank)

    def __call__(self, x: Tensor, out: Tensor | None = None, *, async_op: bool = False) -> Work:
        """Writes the mean of `x` over ranks to `out`, by default `x` itself. Both are 1-D, fp32, bf16 or fp16.

        With `async_op`, the first phase runs until `wait` is called on the returned object; `wait` does the rest.
        `x` and `out` must not be touched in between.
        """
        out = x if out is None else out
        feedback = self.feedback
        for name, tensor in (("x", x), ("out", out)):
            if tensor.dim() != 1 or tensor.numel() != feedback.numel:
                raise ValueError(
                    f"CompressedAllReduce: {name} must be 1-D with {feedback.numel} elements, but has shape "
                    f"{tuple(tensor.shape)}"
                )
        if self.channel.world_size == 1:
            self._alone(x, out)
            return Done()
        sent, received = self._buffers(x)
        self._calls += 1
        self._encode_parts(x, sent)
        own = self.part_bytes[self.channel.rank]
        first = self.channel.all_to_all(received, sent, self.part_bytes, [own] * self.channel.world_size)
        work = Chain(first, partial(self._reduce, received, sent), partial(self._decode_parts, sent, out))
        if not async_op:
            work.wait()
        return work

    def _buffers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        own = self.part_bytes[self.channel.rank]
        sent = torch.empty(sum(self.part_bytes), dtype=torch.uint8, device=x.device)
        return sent, torch.empty(own * self.channel.world_size, dtype=torch.uint8, device=x.device)

    def _alone(self, x: Tensor, out: Tensor) -> None:
        feedback = self.feedback
        total = x.to(torch.float32) + feedback.worker + feedback.server
        feedback.clear()
        out.copy_(total)

    def _encode_parts(self, x: Tensor, sent: Tensor) -> None:
        feedback = self.feedback
        for (start, blocks), payload in zip(feedback.parts, sent.split(self.part_bytes), strict=True):
            if len(blocks):
                here = slice(start, start + blocks.numel)
                feedback.compressor.encode(
                    x[here], payload, blocks, residual=feedback.worker[here], seed=self._seed(start)
                )

    def _seed(self, place: int) -> int:
        """Of stochastic rounding: differs between calls, ranks and places."""
        return (self._calls * 0x9E3779B97F4A7C15 + (self.channel.rank << 40) + place) % 2**64

    def _reduce(self, received: Tensor, gathered: Tensor) -> Work:
        """Second phase: averages this rank's part, and starts to send it."""
        feedback, world_size = self.feedback, self.channel.world_size
        blocks = feedback.parts[feedback.rank][1]
        own = torch.zeros(self.part_bytes[feedback.rank], dtype=torch.uint8, device=received.device)
        if len(blocks):
            mean = torch.empty(blocks.numel, dtype=torch.float32, device=received.device)
            for rank, payload in enumerate(received.chunk(world_size)):
                feedback.compressor.decode(payload, mean, blocks, weight=1.0 / world_size, add=rank > 0)
            feedback.compressor.encode(mean, own, blocks, residual=feedback.server, seed=self._seed(-1))
        return self.channel.all_gather(gathered, own, self.part_bytes)

    def _decode_parts(self, gathered: Tensor, out: Tensor) -> None:
        for (start, blocks), payload in zip(
            self.feedback.parts, gathered.split(self.part_bytes), strict=True
        ):
            if len(blocks):
                self.feedback.compressor.decode(payload, out[start : start + blocks.numel], blocks)
