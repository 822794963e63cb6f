"""Frozen parameters in 8 bits: what each rank keeps of them, and what it sends when they are gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ds_comm.compress.blocks import Blocks
from ds_comm.compress.integer import IntCompressor
from ds_comm.compress.interfaces import Compressor
from ds_comm.exchange.channel import Chain, Done, Work
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
    """A store of shards, as ds_zero asks for it, in which frozen parameters are payloads of a compressor. Where they
    are kept, on the device, in host memory or on a disk, is decided by the store behind it.

    [Note: fixed point]
    Decoding in bf16 rounds, so encoding the decoded values gives other scales than the first time, and another rank
    would read other values than the owner. So values are encoded, decoded and encoded again until nothing changes: then
    what the owner reads is what all ranks decode from its message.
    """

    def __init__(self, inner: Any, compressor: Compressor) -> None:
        """Args:
        inner: the store of payloads, and of everything else.
        """
        self._inner, self._compressor = inner, compressor
        self._frozen: dict[Key, _Frozen] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the frozen parameters of this rank."""
        return sum(frozen.num_bytes for frozen in self._frozen.values())

    def reserve(self, plan: Sequence[Item]) -> Mapping[Any, Tensor]:
        """Allocates, and returns the tensors that the optimizer updates in place; frozen parameters are not among
        them: they are read by `load`.
        """
        trained = {item.key.name for item in plan if item.key.kind == "grad"}
        asked: list[Any] = []
        for item in plan:
            if item.key.kind != "param" or item.key.name in trained or item.dtype not in FLOATS:
                asked.append(item)
                continue
            num_bytes = self._compressor.payload_bytes(_blocks(item.numel, self._compressor))
            self._frozen[item.key] = _Frozen(item.numel, num_bytes)
            asked.append(replace(item, numel=num_bytes, dtype=torch.uint8))  # type: ignore[type-var]
        mapped = dict(self._inner.reserve(asked))
        for key in [key for key in mapped if key in self._frozen]:
            self._frozen[key].payload = mapped.pop(key)
        return mapped

    def load(self, key: Key, out: Tensor) -> Work:
        """Starts to copy the stored values into `out`."""
        frozen = self._frozen.get(key)
        if frozen is None:
            work: Work = self._inner.load(key, out)
            return work
        if frozen.payload is not None:
            self._decode(frozen, frozen.payload, out)
            return Done()
        payload = self.staging(frozen.num_bytes, torch.uint8, out.device)
        return Chain(self._inner.load(key, payload), lambda: self._decode(frozen, payload, out))

    def store(self, key: Key, src: Tensor) -> Work:
        """Starts to store `src`."""
        frozen = self._frozen.get(key)
        if frozen is None:
            work: Work = self._inner.store(key, src)
            return work
        values = src.detach().clone()
        blocks = frozen.blocks(self._compressor, values.device)
        payload = self._compressor.payload_like(blocks, values.device).zero_()
        for _ in range(_ROUNDS):
            before = values.clone()
            self._compressor.encode(values, payload, blocks)
            self._compressor.decode(payload, values, blocks)
            if torch.equal(values, before):
                break
        if frozen.payload is None:
            return self._inner.store(key, payload)  # type: ignore[no-any-return]
        frozen.payload.copy_(payload)
        return Done()

    def _decode(self, frozen: _Frozen, payload: Tensor, out: Tensor) -> None:
        blocks = frozen.blocks(self._compressor, out.device)
        # Codes travel to the device, and not values: they are smaller.
        self._compressor.decode(payload.to(out.device, non_blocking=True), out, blocks)

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
        self._frozen.pop(key, None)
        self._inner.release(key)

    def close(self) -> None:
        """Frees everything."""
        self._frozen.clear()
        self._inner.close()


class _Frozen:
    """One frozen tensor of this rank."""

    def __init__(self, numel: int, num_bytes: int) -> None:
        self.numel, self.num_bytes = numel, num_bytes
        self.payload: Tensor | None = None
        """None: it is not in memory as a tensor."""
        self._blocks: dict[torch.device, Blocks] = {}

    def blocks(self, compressor: Compressor, device: torch.device) -> Blocks:
        """Returns its blocks on a device, where they stay."""
        if device not in self._blocks:
            self._blocks[device] = _blocks(self.numel, compressor).to(device)
        return self._blocks[device]


def _blocks(numel: int, compressor: Compressor) -> Blocks:
    return Blocks(table=Blocks.uniform(numel, compressor.block_numel).table, numel=numel)
