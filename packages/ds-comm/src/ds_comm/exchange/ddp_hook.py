"""A communication hook for DistributedDataParallel: gradients of one bit an element, with error feedback.

DistributedDataParallel compares the annotations of a hook with types, so they are not postponed in this module.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.feedback import ErrorFeedback
from ds_comm.compress.interfaces import Compressor
from ds_comm.compress.sign import SignCompressor
from ds_comm.exchange.channel import Channel, Traffic
from ds_comm.exchange.compressed import CompressedAllReduce


class CompressedHook:
    """State of the hook: `ddp.register_comm_hook(state, CompressedHook.reduce)`.

    Each bucket is averaged by a two-phase compressed all-reduce with residuals of its own. Any optimizer can
    follow; learning rates near the limit of stability diverge, because residuals act like a delay. With Adam,
    `ds_comm.optim.OneBitAdam` converges better, because it freezes the variance before it compresses.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        compressor: Compressor | None = None,
        start_step: int = 100,
        residual_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Args:
        group: the group of the DistributedDataParallel; None: all ranks.
        compressor: None: `SignCompressor()`.
        start_step: backward passes that average at full precision first, at least 2: DistributedDataParallel
            arranges its buckets anew after the first.
        residual_dtype: torch.float32 or torch.bfloat16.
        """
        if start_step < 2:
            raise ValueError(
                f"CompressedHook: start_step must be at least 2, because DistributedDataParallel arranges its "
                f"buckets anew after the first backward pass, but is {start_step}"
            )
        self.channel = Channel(group)
        self.compressor: Compressor = SignCompressor() if compressor is None else compressor
        self.start_step = start_step
        self.residual_dtype = residual_dtype
        self.steps = 0
        """Backward passes so far."""
        self._reduces: dict[int, tuple[CompressedAllReduce, list[int], list[int]]] = {}

    @property
    def traffic(self) -> Traffic:
        """Calls and bytes that this rank has sent."""
        return self.channel.traffic

    @staticmethod
    def reduce(
        state: "CompressedHook",
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        """The hook."""
        buffer = bucket.buffer()
        if state.steps < state.start_step:
            state.channel.all_reduce(buffer).wait()
            buffer.div_(state.channel.world_size)
        else:
            state._compressed(bucket, buffer)
        state.steps += bucket.is_last()
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(buffer)
        return future

    def _compressed(self, bucket: dist.GradBucket, buffer: Tensor) -> None:  # type: ignore[name-defined]
        if bucket.index() not in self._reduces:
            numels = [p.numel() for p in bucket.parameters()]
            blocks, offsets = Blocks.of(numels, self.compressor.block_numel)
            feedback = ErrorFeedback(
                self.compressor,
                blocks,
                rank=self.channel.rank,
                world_size=self.channel.world_size,
                device=buffer.device,
                dtype=self.residual_dtype,
            )
            self._reduces[bucket.index()] = CompressedAllReduce(self.channel, feedback), numels, offsets
        reduce, numels, offsets = self._reduces[bucket.index()]
        aligned = torch.zeros(reduce.feedback.numel, dtype=torch.float32, device=buffer.device)
        places = [aligned[o : o + n] for o, n in zip(offsets, numels, strict=True)]
        parts = buffer.split(numels)
        for place, part in zip(places, parts, strict=True):
            place.copy_(part)
        reduce(aligned)
        for place, part in zip(places, parts, strict=True):
            part.copy_(place)
