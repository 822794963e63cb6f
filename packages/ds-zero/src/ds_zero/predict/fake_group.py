"""Replacements for ranks and stores, with which `plan` runs `shard` and a training step without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_zero.comm.ranks import SimulatedGroup
from ds_zero.comm.works import Done
from ds_zero.interfaces import ChoosesTiers, Reservation, ShardKey, Tier, Work
from ds_zero.params.stores import ResidentStore
from ds_zero.predict.tiers import with_states


class _Arrived(dist.Work):
    def wait(self, timeout: object = None) -> bool:
        return True


class FakeGroup(SimulatedGroup):
    """A process group of `size` ranks, as rank `rank`. Messages are counted, but not sent."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._sent = [0.0]
        self._messages = [0]

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeGroup:
        """Returns itself: a copied module talks to the same ranks."""
        return self

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank would have sent, by direct messages or by a ring inside the backend."""
        return self._sent[0]

    @sent_bytes.setter
    def sent_bytes(self, value: float) -> None:
        self._sent[0] = value

    @property
    def messages(self) -> int:
        """Number of collectives."""
        return self._messages[0]

    @messages.setter
    def messages(self, value: int) -> None:
        self._messages[0] = value

    def count(self, num_bytes: float) -> None:
        """Counts bytes that this rank would have sent."""
        self._sent[0] += num_bytes

    def part(self, size: int) -> FakeGroup:
        """Returns a subgroup of `size` ranks; its messages are counted here, too."""
        return self.same_counts(size)

    def same_counts(self, size: int) -> FakeGroup:
        """Returns a group of `size` ranks, whose messages are counted here, too."""
        made = FakeGroup(self.rank() % size, size)
        made._sent, made._messages = self._sent, self._messages
        return made

    def _sends(self, tensors: Sequence[Tensor], times: float) -> dist.Work:
        self._messages[0] += 1
        self.count(times * sum(t.numel() * t.element_size() for t in tensors))
        return _Arrived()

    def broadcast(self, tensors: Any, *opts: Any, **more: Any) -> Any:  # type: ignore[override]
        return self._sends(tensors, 1.0)

    def allreduce(self, tensors: Any, *opts: Any, **more: Any) -> Any:  # type: ignore[override]
        return self._sends(tensors, 2 * (self.size() - 1) / self.size())

    def allgather(self, outputs: Any, inputs: Any, *opts: Any, **more: Any) -> Any:  # type: ignore[override]
        return self._sends(inputs, self.size() - 1)

    def alltoall(self, outputs: Any, inputs: Any, *opts: Any, **more: Any) -> Any:  # type: ignore[override]
        return self._sends([t for lists in [inputs] for t in lists], (self.size() - 1) / self.size())

    def send(self, tensors: Any, dstRank: int, tag: int) -> Any:
        return self._sends(tensors, 1.0)

    def recv(self, tensors: Any, srcRank: int, tag: int) -> Any:
        return _Arrived()

    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        return self._sends([input], self.size() - 1)

    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> Any:
        return self._sends([input], (self.size() - 1) / self.size())

    def all_to_all_single(self, output: Any, input: Any, *others: Any) -> Any:
        return self._sends([input], (self.size() - 1) / self.size())

    # the names before torch 2.13
    def _allgather_base(self, output: Any, input: Any, opts: Any = None) -> Any:
        return self.all_gather_single(output, input)

    def _reduce_scatter_base(self, outputTensor: Any, inputTensor: Any, opts: Any = None) -> Any:
        return self.reduce_scatter_single(outputTensor, inputTensor)

    def alltoall_base(self, output: Any, input: Any, *others: Any, **more: Any) -> Any:  # type: ignore[override]
        return self.all_to_all_single(output, input)

    def barrier(self, opts: Any = None) -> Any:
        return _Arrived()


class StandInStore(ResidentStore):
    """A `ShardStore` that keeps tensors on the device, in host memory and on a disk, as those of ds_offload do."""

    def __init__(
        self, tiers: ChoosesTiers, on_host: Callable[[Tensor], None], *, simulates_accelerator: bool
    ) -> None:
        super().__init__()
        self.simulates_accelerator = simulates_accelerator
        """Whether tensors on the device are no host memory, although both are fake CPU tensors."""
        self._choose, self._on_host = tiers, on_host
        self._tiers: dict[ShardKey, Tier] = {}
        self._to_host = False

    def reserve(self, plan: Sequence[Reservation]) -> Any:
        new = [item for item in plan if self._bucket_key(item.key) not in self._tiers]
        items = with_states(new)
        self._tiers.update(zip([item.key for item in items], self._choose(items), strict=True))
        tiers = [self._tiers[self._bucket_key(item.key)] for item in plan]
        self._to_host = True
        on_host = dict(super().reserve([r for r, t in zip(plan, tiers, strict=True) if t == "host"]))
        self._to_host = False
        return on_host | dict(super().reserve([r for r, t in zip(plan, tiers, strict=True) if t == "device"]))

    def _bucket_key(self, key: ShardKey) -> ShardKey:
        """Returns the key itself, or the first one of its bucket if it is a further partial sum."""
        base = ShardKey(name=key.name.rpartition("+")[0], kind=key.kind)
        return base if key not in self._tiers and base in self._tiers else key

    def _is_on_disk(self, key: ShardKey) -> bool:
        return self._tiers[self._bucket_key(key)] == "disk"

    def _allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        made = super()._allocate(numel, dtype, device)
        if self._to_host:
            self._on_host(made)
        return made

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a buffer in host memory."""
        made = torch.empty(numel, dtype=dtype, device=device)
        self._on_host(made)
        return made

    def load(self, key: ShardKey, out: Tensor) -> Work:
        return Done() if self._is_on_disk(key) else super().load(key, out)

    def store(self, key: ShardKey, src: Tensor) -> Work:
        return Done() if self._is_on_disk(key) else super().store(key, src)

    def sink_grad(self, key: ShardKey, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        if self._is_on_disk(key):
            return Done()
        return super().sink_grad(key, grad, offset=offset, accumulate=accumulate)
