"""Activation offload in a plan: the same decisions as in training, on fake tensors.

[Note: planned activation offload]
A plan runs the job on tensors without elements, so that `ActivationOffload` runs, too, with its order of copies, its
prefetch and its buffers. Only the ends are others: memory is fake, copies copy nothing, and a disk counts bytes. What
depends on time is assumed as late as possible, so that the plan is an upper bound: a tensor leaves an accelerator only
when `in_flight_bytes` demand it, and a buffer is written only when another one is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ds_offload.activations.buffers import HostBuffers
from ds_offload.activations.choice import LayerChoice
from ds_offload.activations.copies import Copies, Copy, Finished, HostCopies
from ds_offload.activations.offload import ActivationOffload
from ds_offload.activations.on_disk import DiskPlace
from ds_offload.activations.options import ActivationOptions
from ds_offload.activations.places import HostPlace, Place
from ds_offload.nvme.swap_file import aligned


class PlannedActivationOffload:
    """The argument `activations` of `ds_zero.plan`.

        ds_zero.plan(model, batch, activations=PlannedActivationOffload(ActivationOptions(device="cpu")))

    Nothing is written, and `ActivationOptions.nvme_path` need not exist.
    """

    def __init__(self, options: ActivationOptions, layers: Sequence[str] | None = None) -> None:
        """
        Args:
            layers: names of submodules: see `ActivationOffload.attach`.
        """
        self._options, self._layers = options, layers
        self.choice: LayerChoice | None = None
        """Which layers are moved, with `ActivationOptions.device_bytes`, once the plan has been made."""

    def _choose(self, choice: LayerChoice) -> None:
        self.choice = choice

    @property
    def host_limit_bytes(self) -> int | None:
        """The most host memory that moved tensors take; None: no limit."""
        options = self._options
        return options.disk_buffer_bytes if options.device == "nvme" else options.max_host_bytes

    def attach(
        self, model: nn.Module, on_host: Callable[[Tensor], None], *, accelerator: bool
    ) -> _OnFakeTensors:
        """Moves, from now on, the fake tensors that autograd saves in forwards of `model`.

        Args:
            on_host: is called with each fake tensor that stands for host memory.
            accelerator: whether fake CPU tensors stand for those of an accelerator.

        Raises:
            ValueError: the model has no such layers.
        """
        offload = _OnFakeTensors(self._options, on_host, self._choose, accelerator=accelerator)
        offload.attach(model, self._layers)
        return offload


class _OnFakeTensors(ActivationOffload):
    _tensor_type = FakeTensor

    def __init__(
        self,
        options: ActivationOptions,
        on_host: Callable[[Tensor], None],
        chosen: Callable[[LayerChoice], None],
        *,
        accelerator: bool,
    ) -> None:
        copies = _LateCopies() if accelerator else _NoCopies()
        super().__init__(options, make_copies=lambda _: copies, chosen=chosen)
        self._on_host = on_host
        self._space = _CountedSpace()

    @property
    def moved_bytes(self) -> int:
        """Bytes that have left the device so far."""
        return self.statistics.moved_bytes

    @property
    def disk_bytes(self) -> int:
        """The most bytes on the disk at one time."""
        return self._space.peak_bytes

    def _new_place(self, device: torch.device, copies: Copies) -> Place:
        options = self.options
        if options.device == "nvme":
            buffers = HostBuffers(device, options.disk_buffer_bytes, allocate=self._host_memory)
            return DiskPlace(device, copies, buffers, self._space)
        return HostPlace(
            device, copies, HostBuffers(device, options.max_host_bytes, allocate=self._host_memory)
        )

    def _source(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        return torch.empty(1, dtype=torch.uint8).expand(end - begin)  # nobody reads it

    def _host_memory(self, num_bytes: int) -> Tensor:
        memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._on_host(memory)
        return memory


class _NoCopies(HostCopies):
    """Copies within host memory."""

    def start(self, src: Tensor, dst: Tensor) -> Copy:
        return Finished()


class _LateCopies:
    """Copies between an accelerator and the host."""

    def start(self, src: Tensor, dst: Tensor) -> Copy:
        return _Late()


class _Late:
    """A copy, or a write, that is done when somebody waits for it."""

    def __init__(self) -> None:
        self._done = False

    def done(self) -> bool:
        return self._done

    def wait(self) -> None:
        self._done = True

    def order(self) -> None:
        self._done = True


class _CountedExtent:
    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def write(self, values: Tensor) -> _Late:
        return _Late()

    def read(self, out: Tensor) -> _Late:
        return _Late()

    def check(self, values: Tensor) -> None:
        return None


class _CountedSpace:
    """Implements `Space` by counting."""

    def __init__(self) -> None:
        self.in_use_bytes = 0
        self.peak_bytes = 0

    def allocate(self, num_bytes: int) -> _CountedExtent:
        self.in_use_bytes += aligned(num_bytes)
        self.peak_bytes = max(self.peak_bytes, self.in_use_bytes)
        return _CountedExtent(num_bytes)

    def first_aligned_byte(self, memory: Tensor) -> int:
        return 0

    def release(self, extent: _CountedExtent) -> None:
        self.in_use_bytes -= aligned(extent.num_bytes)

    def close(self) -> None:
        return None
