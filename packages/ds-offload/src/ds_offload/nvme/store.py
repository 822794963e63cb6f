"""A store on a disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ds_core import io
from ds_offload.host import HostStore, host_memory
from ds_offload.interfaces import ChoosesTiers, Done, Key, Reservation, Tier, Work
from ds_offload.nvme.block_sums import BlockSums
from ds_offload.nvme.options import NVMeOptions
from ds_offload.nvme.swap_file import ALIGNMENT, SwapFile, aligned
from ds_offload.tiers import KnownTiers, TiersByKind


class SwapError(RuntimeError):
    """A disk returned other values than were written."""


@dataclass(eq=False)
class _Extent:
    """Where one tensor is on the disk."""

    file: SwapFile
    offset: int
    numel: int
    dtype: torch.dtype
    sums: BlockSums
    is_zero: bool = True
    """Whether it was never written, so that all its values are 0."""

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _After:
    """An operation of the disk, and what remains to be done when it has finished."""

    def __init__(self, work: Work, finish: Callable[[], None]) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> None:
        self._work.wait()
        self._finish()


class _Writing:
    """A write, with the tensor that it reads."""

    def __init__(self, work: Work, held: Tensor) -> None:
        self._work, self._held = work, held

    def wait(self) -> None:
        self._work.wait()


class NVMeStore:
    """Keeps state on a disk, in one file for each call of `reserve`. Other kinds are kept in host memory.

    Pass it as `ds_zero.shard(..., store=NVMeStore(folder))`, and as the store of a `PagedOptimizer`. What was never
    written is zero, and is not read from the disk.
    """

    def __init__(
        self,
        folder: str | Path | Mapping[str, str | Path],
        kinds: Collection[str] = ("master", "grad", "state"),
        *,
        host: Collection[str] = ("master", "grad", "state"),
        tiers: ChoosesTiers | None = None,
        options: NVMeOptions | None = None,
        pin: bool = True,
    ) -> None:
        """
        Args:
            folder: an existing folder on the disk; or kind -> folder, instead of `kinds`. [Note: files without a name]
            kinds: the kinds of tensors on the disk: "master", "grad", "param" (sharded parameters in their compute
                dtype), "state" (pages of a `PagedOptimizer`).
            host: the kinds in host memory, if they are not on the disk. Others stay on the device of the model.
            tiers: decides for each tensor, instead of `host` and the kinds; those that it stores on a disk must have
                a folder.
            pin: page-lock host memory and staging buffers if the device of the model is an accelerator.

        Raises:
            OSError: the folder cannot be used (raised by the first `reserve`).
        """
        folders = folder if isinstance(folder, Mapping) else dict.fromkeys(kinds, folder)
        self.folders = {kind: Path(path) for kind, path in folders.items()}
        """Kind -> folder, for the kinds on the disk."""
        self.options = options or NVMeOptions()
        host = frozenset(host) - self.folders.keys()
        self._host = HostStore(host, pin=pin)
        self._tiers = KnownTiers(tiers or TiersByKind(host=host, disk=self.folders.keys()))
        self._engine: io.Engine | None = None
        self._extents: dict[Key, _Extent] = {}
        self._files: list[SwapFile] = []

    @property
    def num_bytes(self) -> int:
        """Bytes on the disk."""
        return sum(file.num_bytes for file in self._files)

    def reserve(self, plan: Sequence[Reservation]) -> Mapping[Key, Tensor]:
        """Reserves space on the disk for the kinds that belong there; maps the others to memory.

        Raises:
            OSError: the folder cannot be used, or its disk has no room. Nothing was reserved.
        """
        tiers = self._tiers.of(plan)
        by_folder: dict[Path, list[Reservation]] = {}
        for item, tier in zip(plan, tiers, strict=True):
            if tier == "disk" and item.numel:
                by_folder.setdefault(self._folder_of(item), []).append(item)
        made: list[SwapFile] = []
        try:
            for folder, items in by_folder.items():
                made.append(SwapFile(self._open_engine(), folder, sum(_size(item) for item in items)))
        except BaseException:
            for file in made:
                file.close()
            raise
        for file, items in zip(made, by_folder.values(), strict=True):
            file.num_extents = len(items)
            offset = 0
            for item in items:
                sums = BlockSums(item.numel * item.dtype.itemsize, self.options.verify)
                self._extents[item.key] = _Extent(file, offset, item.numel, item.dtype, sums)
                offset += _size(item)
        self._files += made
        empty = {
            item.key for item, tier in zip(plan, tiers, strict=True) if tier == "disk" and not item.numel
        }
        others = [
            (item, tier) for item, tier in zip(plan, tiers, strict=True) if item.key not in self._extents
        ]
        mapped = self._host.reserve_in(
            [item for item, _ in others], ["host" if tier == "disk" else tier for _, tier in others]
        )
        return {key: tensor for key, tensor in mapped.items() if key not in empty}

    def state_tier(self, param: Tensor) -> Tier:
        """Returns where the states of an optimizer's entry belong."""
        name = self._host.bucket_of(param)
        chosen = self._tiers.of_states(name) if name is not None else None
        return chosen or ("disk" if "state" in self.folders else self._host.state_tier(param))

    def _folder_of(self, item: Reservation) -> Path:
        folder = self.folders.get(item.key.kind)
        if folder is None:
            raise ValueError(
                f"NVMeStore: the {item.key.kind} of {item.key.name!r} belongs on a disk, but there is no folder for "
                f"kind {item.key.kind!r}: there are folders for {', '.join(sorted(self.folders)) or 'nothing'}"
            )
        return folder

    def load(self, key: Key, out: Tensor) -> Work:
        """Starts to read the stored tensor into `out`."""
        extent = self._extents.get(key)
        if extent is None:
            return self._host.load(key, out)
        if extent.is_zero:
            out.zero_()
            return Done()
        buffer = out if _is_readable(out, extent) else self.staging(extent.numel, extent.dtype, out.device)
        work = extent.file.file.read(buffer, extent.offset)

        def finish() -> None:
            self._check(key, extent, buffer)
            if buffer is not out:
                out.copy_(buffer)

        return _After(work, finish)

    def store(self, key: Key, src: Tensor) -> Work:
        """Starts to write `src`, rounded to the dtype of the reservation."""
        extent = self._extents.get(key)
        if extent is None:
            return self._host.store(key, src)
        return self._write(extent, src, 0)

    def sink_grad(self, key: Key, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        """Starts to write a reduced gradient from element `offset` on, or to add it to the stored one.

        An addition reads what is stored now, and adds and writes in `wait`.
        """
        extent = self._extents.get(key)
        if extent is None:
            return self._host.sink_grad(key, grad, offset=offset, accumulate=accumulate)
        if not accumulate or extent.is_zero:
            return self._write(extent, grad, offset)
        old = self.staging(grad.numel(), extent.dtype, torch.device("cpu"))
        begin = offset * extent.dtype.itemsize
        work = extent.file.file.read(old, extent.offset + begin)

        def finish() -> None:
            self._check(key, extent, old, begin)
            old.add_(grad.to(old.device))
            self._write(extent, old, offset).wait()

        return _After(work, finish)

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a CPU tensor that begins at a multiple of 4096 bytes, as O_DIRECT requires; page-locked if `device`
        is an accelerator.
        """
        memory = host_memory(numel, dtype, device, pin=self._host.pin)
        if memory.data_ptr() % ALIGNMENT == 0:  # as all but small ones
            return memory
        spare = ALIGNMENT // dtype.itemsize
        memory = host_memory(numel + spare, dtype, device, pin=self._host.pin)
        begin = -memory.data_ptr() % ALIGNMENT // dtype.itemsize
        return memory[begin : begin + numel]

    def release(self, key: Key) -> None:
        """Forgets one tensor. The space of a file is freed with its last tensor."""
        extent = self._extents.pop(key, None)
        if extent is None:
            self._host.release(key)
            return
        extent.file.num_extents -= 1
        if not extent.file.num_extents:
            self._files.remove(extent.file)
            extent.file.close()

    def close(self) -> None:
        """Frees memory and disk. No operation may be in progress."""
        self._extents.clear()
        self._host.close()
        files, self._files = self._files, []
        for file in files:
            file.close()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _open_engine(self) -> io.Engine:
        if self._engine is None:
            chosen = self.options
            self._engine = io.Engine(
                backend=chosen.backend,
                block_bytes=chosen.block_bytes,
                queue_depth=chosen.queue_depth,
                num_threads=chosen.num_threads,
                direct=chosen.direct,
            )
        return self._engine

    def _write(self, extent: _Extent, src: Tensor, offset: int) -> Work:
        values = src.detach().to("cpu", extent.dtype).contiguous()
        begin = offset * extent.dtype.itemsize
        extent.sums.written(begin, values.view(torch.uint8))
        extent.is_zero = False
        return _Writing(extent.file.file.write(values, extent.offset + begin), values)

    def _check(self, key: Key, extent: _Extent, values: Tensor, begin: int = 0) -> None:
        """Compares values that were read from byte `begin` of the tensor on."""
        first = extent.sums.first_difference(begin, values.view(torch.uint8))
        if first is not None:
            raise SwapError(
                f"the {key.kind} of {key.name!r} was changed on the disk: other values were read from "
                f"{extent.file.file.path}, byte {extent.offset + first} on, than were written. Check the disk, and "
                "that no other process writes to it; then continue from a checkpoint"
            )


def _size(item: Reservation) -> int:
    """Returns the bytes that a tensor takes in a file."""
    return aligned(item.numel * item.dtype.itemsize)


def _is_readable(out: Tensor, extent: _Extent) -> bool:
    """Whether the disk can read into `out` itself."""
    return out.device.type == "cpu" and out.is_contiguous() and out.dtype == extent.dtype
