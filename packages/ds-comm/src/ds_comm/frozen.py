"""Frozen parameters in 8 bits: what each rank keeps of them, and what it sends when they are gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.integer import IntCompressor
from ds_comm.compress.interfaces import Compressor
from ds_comm.exchange.channel import Done, Work
from ds_comm.exchange.quantized import FLOATS, QuantizedAllGather

_ROUNDS = 4
"""[Note: fixed point]: two suffice except where a scale is at the edge of its dtype."""


class Key(Protocol):
    """Names a stored tensor, as ds_zero's `ShardKey`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...


class Item(Protocol):
    """A tensor that a store must hold, as ds_zero's `Reservation`."""

    @property
    def key(self) -> Key: ...
    @property
    def numel(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


class QuantizedFrozen:
    """Keeps and gathers parameters that need no gradient in 8 bits an element (`zero_quantized_nontrainable_weights` of
    DeepSpeed), for `ds_comm.collectives(frozen=...)` at stage 3: 1 + 4 / block_numel bytes an element.

    An element is wrong by at most 1/254 of the largest of its block, once, when the model is sharded or loaded. All
    ranks have the same values, and checkpoints have them in the dtype of the parameters.
    """

    def __init__(self, compressor: Compressor | None = None) -> None:
        """Args:
        compressor: None: `IntCompressor(bits=8)`, rounded to nearest.
        """
        self.compressor = IntCompressor(bits=8) if compressor is None else compressor
        self.all_gather = QuantizedAllGather(self.compressor)
        """Sends what is stored: a rank encodes its decoded slice again, which gives the same codes."""

    def stored_in(self, store: Any) -> Any:
        """Returns a store that keeps frozen parameters here, and everything else in `store`."""
        return FrozenStore(store, self.compressor)

    def stored_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Returns the bytes in which it keeps a tensor."""
        return self.compressor.payload_bytes(_blocks(numel, self.compressor)) if dtype in FLOATS else 0


class FrozenStore:
    """A store of shards, as ds_zero asks for it, whose frozen parameters are payloads of a compressor.

    [Note: fixed point]
    Decoding in bf16 rounds, so encoding the decoded values gives other scales than the first time, and another rank
    would read other values than the owner. So values are encoded, decoded and encoded again until nothing changes: then
    what the owner reads is what all ranks decode from its message.
    """

    def __init__(self, inner: Any, compressor: Compressor) -> None:
        """Args:
        inner: the store of everything else.
        """
        self._inner, self._compressor = inner, compressor
        self._held: dict[Key, tuple[Tensor, Blocks]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the frozen parameters of this rank."""
        return sum(payload.nbytes for payload, _ in self._held.values())

    def reserve(self, plan: Sequence[Item]) -> Mapping[Any, Tensor]:
        """Allocates, and returns the tensors that the optimizer updates in place; frozen parameters are not among
        them: they are read by `load`.
        """
        trained = {item.key.name for item in plan if item.key.kind == "grad"}
        others = []
        for item in plan:
            frozen = item.key.kind == "param" and item.key.name not in trained
            if not frozen or item.dtype not in FLOATS:
                others.append(item)
                continue
            blocks = _blocks(item.numel, self._compressor).to(item.device)
            self._held[item.key] = (self._compressor.payload_like(blocks, item.device).zero_(), blocks)
        mapped: Mapping[Any, Tensor] = self._inner.reserve(others)
        return mapped

    def load(self, key: Key, out: Tensor) -> Work:
        """Copies the stored values into `out`."""
        if key not in self._held:
            work: Work = self._inner.load(key, out)
            return work
        payload, blocks = self._held[key]
        self._compressor.decode(payload, out, blocks)
        return Done()

    def store(self, key: Key, src: Tensor) -> Work:
        """Stores `src`."""
        if key not in self._held:
            work: Work = self._inner.store(key, src)
            return work
        payload, blocks = self._held[key]
        values = src.detach().to(payload.device, copy=True)
        for _ in range(_ROUNDS):
            before = values.clone()
            self._compressor.encode(values, payload, blocks)
            self._compressor.decode(payload, values, blocks)
            if torch.equal(values, before):
                break
        return Done()

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a buffer for values that are not in memory as tensors."""
        make = getattr(self._inner, "staging", None)
        made: Tensor = (
            torch.empty(numel, dtype=dtype, device=device) if make is None else make(numel, dtype, device)
        )
        return made

    def sink_grad(self, key: Key, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        """Writes or adds a reduced gradient, in the store of everything else."""
        work: Work = self._inner.sink_grad(key, grad, offset=offset, accumulate=accumulate)
        return work

    def release(self, key: Key) -> None:
        """Frees a tensor."""
        if self._held.pop(key, None) is None:
            self._inner.release(key)

    def close(self) -> None:
        """Frees everything."""
        self._held.clear()
        self._inner.close()


def _blocks(numel: int, compressor: Compressor) -> Blocks:
    return Blocks(table=Blocks.uniform(numel, compressor.block_numel).table, numel=numel)
