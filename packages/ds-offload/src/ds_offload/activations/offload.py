"""Moves the tensors that autograd saves in a forward to host memory or to a disk, until backward needs them."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from ds_offload.activations.buffers import HostBuffers
from ds_offload.activations.choice import LayerChoice, choose_within
from ds_offload.activations.copies import Copies, MakeCopies, copies_of
from ds_offload.activations.disk_space import DiskSpace
from ds_offload.activations.layers import layers_of, named_layers
from ds_offload.activations.on_disk import DiskPlace
from ds_offload.activations.options import ActivationOptions, ActivationStatistics
from ds_offload.activations.places import HostPlace, Place
from ds_offload.activations.recording import Recording
from ds_offload.activations.saved import KeptTensor, Piece, SavedTensor, as_bytes, byte_range
from ds_offload.activations.uncompiled import opaque

_PARTS = 4
"""A tensor that takes less than one in so many bytes of its storage is moved without the rest of it."""
_ALIGNMENT = 64

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
"""pack and unpack of `torch.autograd.graph.saved_tensors_hooks`."""


class _Thread(threading.local):
    """What this thread computes."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.active: list[saved_tensors_hooks | None] = []
        """One entry for each open block or call; the hooks that it has enabled, if it has."""
        self.outer: Hooks | None = None
        """The hooks that were enabled before ours."""
        self.layers = 0
        """Number of open calls of layers."""


class ActivationOffload:
    """Moves what autograd saves for backward to host memory or a disk, and brings it back before backward needs it.

        offload = ds_offload.ActivationOffload(ds_offload.ActivationOptions(device="cpu"))
        with offload:
            loss = model(batch)
        loss.backward()

    or, once, `offload.attach(model)`: then each forward of the model is such a block. Gradients have the same bits as
    without. What was moved is freed with autograd's graph, also if backward never runs.
    """

    _tensor_type: type[Tensor] = Tensor
    """The class of tensors that are moved."""

    def __init__(
        self,
        options: ActivationOptions | None = None,
        *,
        make_copies: MakeCopies = copies_of,
        chosen: Callable[[LayerChoice], None] = lambda choice: None,
    ) -> None:
        """
        Args:
            make_copies: makes what copies between a device and host memory; for tests.
            chosen: called at the end of a forward after which other layers stay, with `ActivationOptions.device_bytes`.
        """
        self.options = options or ActivationOptions()
        self.choice: LayerChoice | None = None
        """Which layers are moved, with `ActivationOptions.device_bytes`; None before the first forward."""
        self._chosen = chosen
        self._kept_limit = self.options.budget_bytes
        self.statistics = ActivationStatistics()
        self._make_copies = make_copies
        self._places: dict[torch.device, Place] = {}
        self._thread = _Thread()
        self._lock = threading.RLock()
        self._leaving: deque[weakref.ref[Piece]] = deque()
        self._saved_bytes: int | None = None
        """Of the last forward that saved anything."""
        self._parts: list[tuple[str, int]] = []
        """Of the same: see `choose_within`."""
        self._models: list[nn.Module] = []
        self._owned: set[int] = set()
        """Storages of parameters and buffers of the attached models, by the address of the object."""
        self._device_types: set[str] = set()
        self._only_layers = False
        self._handles: list[RemovableHandle] = []
        self._closed = False

    def __enter__(self) -> ActivationOffload:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def attach(self, model: nn.Module, layers: Sequence[nn.Module | str] | None = None) -> None:
        """Moves, from now on, the tensors that are saved in forwards of `model`. Parameters and buffers stay.

        Args:
            layers: submodules, or their names. Only tensors that are saved in these are moved. Default: all tensors;
                the children of the model's lists (`nn.ModuleList`, `nn.Sequential`) are then the layers that
                `ActivationOptions.prefetch_bytes` speaks of.

        Raises:
            ValueError: there is no such submodule.
        """
        chosen = layers_of(model) if layers is None else named_layers(model, layers)
        self._only_layers = layers is not None
        self._models.append(model)
        names = {module: name for name, module in model.named_modules()}
        self._device_types |= {p.device.type for p in model.parameters()} - {"meta"}
        hooked: list[tuple[nn.Module, Callable[[], None], Callable[[], None]]] = [
            (model, self._begin, self._end)
        ]
        hooked += [(layer, partial(self._begin_layer, names[layer]), self._end_layer) for layer in chosen]
        for module, begin, end in hooked:
            # Ours is enabled last and disabled first, so that hooks of others are nested around it.
            self._handles += [
                module.register_forward_pre_hook(_calling(begin)),
                module.register_forward_hook(_calling(end), prepend=True, always_call=True),
            ]

    def detach(self) -> None:
        """Undoes `attach`. Backwards of forwards that were made before still work."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._models.clear()
        self._owned.clear()
        self._device_types.clear()
        self._only_layers = False

    def close(self) -> None:
        """Detaches, and frees memory and files. Backwards of forwards that were made before are not possible."""
        self.detach()
        self._closed = True
        places, self._places = self._places, {}
        for place in places.values():
            place.close()

    @opaque
    def _begin(self) -> None:
        thread = self._thread
        if thread.recording is not None or not _is_usable():
            thread.active.append(None)
            return
        if self._closed:
            raise ValueError("this ActivationOffload is closed: make another one")
        tensors = (
            t for model in self._models for part in (model.parameters(), model.buffers()) for t in part
        )
        self._owned = {t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided}
        thread.outer = _enabled_hooks()
        thread.recording = Recording(self.options, self.statistics)
        hooks = saved_tensors_hooks(_Packing(self._pack), _unpack)
        hooks.__enter__()
        thread.active.append(hooks)

    @opaque
    def _end(self) -> None:
        thread = self._thread
        hooks = thread.active.pop() if thread.active else None
        if hooks is None:
            return
        hooks.__exit__(None, None, None)
        recording, thread.recording, thread.outer = thread.recording, None, None
        assert recording is not None
        recording.end()
        if recording.saved_bytes:
            self._saved_bytes = recording.saved_bytes
            self._choose(recording)

    def _choose(self, recording: Recording) -> None:
        """Decides which tensors stay in the next forwards, if there is a limit of device memory.

        Raises:
            BudgetTooSmall: the limit is too low, even if all tensors are moved.
        """
        options = self.options
        parts = [(recording.names.get(section, ""), size) for section, size in recording.parts]
        if options.device_bytes is None or parts == self._parts:
            return
        ahead = options.prefetch_bytes if recording.names else options.ahead_bytes
        choice = choose_within(
            parts,
            limit_bytes=options.device_bytes,
            leaving_bytes=options.leaving_bytes,
            prefetch_bytes=ahead,
        )
        self._parts, self._kept_limit = parts, choice.kept_bytes
        if choice != self.choice:
            self.choice = choice
            self._chosen(choice)

    @opaque
    def _begin_layer(self, name: str) -> None:
        self._begin()
        self._thread.layers += 1
        self._next_section()
        recording = self._thread.recording
        if recording is not None:
            recording.names[recording.section] = name

    @opaque
    def _end_layer(self) -> None:
        self._next_section()
        self._thread.layers -= 1
        self._end()

    def _next_section(self) -> None:
        if self._thread.recording is not None:
            self._thread.recording.section += 1

    @opaque
    def _pack(self, tensor: Tensor) -> Any:
        thread = self._thread
        recording = thread.recording
        movable = recording is not None and self._is_movable(tensor)
        if recording is None or not movable or (self._only_layers and not thread.layers):
            return KeptTensor(tensor) if thread.outer is None else _Foreign(tensor, thread.outer)
        with self._lock:
            piece = recording.find(tensor)
            if piece is None and not recording.is_kept(tensor):
                piece = self._move(recording, tensor)
            mark = recording.mark() if piece is None else None
        return KeptTensor(tensor, mark) if piece is None else SavedTensor(piece, tensor)

    def _move(self, recording: Recording, tensor: Tensor) -> Piece | None:
        """Moves a tensor, if it is not among those that stay."""
        begin, end = _range_to_move(tensor)
        moved = None
        if not self._stays(recording, end - begin):
            self._free_sources(end - begin)
            moved = self._place(tensor.device).move(self._source(tensor, begin, end))
        if moved is None:
            recording.add(tensor, end - begin, None)
            self.statistics.kept_bytes += end - begin
            return None
        piece = Piece(recording, tensor, begin, end - begin, moved)
        recording.add(tensor, end - begin, piece)
        self.statistics.moved_tensors += 1
        self.statistics.moved_bytes += end - begin
        if not piece.release_source(wait=False):
            self._leaving.append(weakref.ref(piece))
        return piece

    def _source(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        """Returns the bytes of the tensor's storage from `begin` to before `end`."""
        return as_bytes(tensor.untyped_storage())[begin:end]

    def _stays(self, recording: Recording, num_bytes: int) -> bool:
        """Whether a piece of so many bytes, the next one, belongs to those that stay on the device."""
        budget = self._kept_limit
        if self._saved_bytes is None or recording.kept_bytes + num_bytes > budget:
            return False
        return recording.saved_bytes >= self._saved_bytes - budget

    def _free_sources(self, num_bytes: int) -> None:
        """Frees memory of tensors that have been copied, so that at most `in_flight_bytes` are being copied if
        `num_bytes` more are.
        """
        pieces = [piece for ref in self._leaving if (piece := ref()) is not None]
        left = [piece for piece in pieces if not piece.release_source(wait=False)]
        allowed = self.options.leaving_bytes - num_bytes
        in_flight = sum(piece.num_bytes for piece in left)
        self._leaving.clear()
        for piece in left:
            if in_flight > allowed:
                piece.release_source(wait=True)
                in_flight -= piece.num_bytes
            else:
                self._leaving.append(weakref.ref(piece))

    def _place(self, device: torch.device) -> Place:
        if device not in self._places:
            self._places[device] = self._new_place(device, self._make_copies(device))
        return self._places[device]

    def _new_place(self, device: torch.device, copies: Copies) -> Place:
        options = self.options
        if options.device == "nvme":
            assert options.nvme_path is not None
            buffers = HostBuffers(device, options.disk_buffer_bytes)
            return DiskPlace(device, copies, buffers, DiskSpace(Path(options.nvme_path), options.nvme))
        return HostPlace(device, copies, HostBuffers(device, options.max_host_bytes))

    def _is_movable(self, tensor: Tensor) -> bool:
        """Whether the values of a tensor may be somewhere else between forward and backward."""
        if (
            type(tensor) is not self._tensor_type
            or tensor.layout is not torch.strided
            or tensor.is_inference()
        ):
            return False  # also parameters and fake tensors
        if (tensor.is_leaf and tensor.requires_grad) or isinstance(tensor._base, nn.Parameter):
            return False
        if tensor.is_conj() or tensor.is_neg() or tensor.device.type == "meta" or not tensor.numel():
            return False
        if self._device_types and tensor.device.type not in self._device_types:
            return False
        storage = tensor.untyped_storage()
        begin, end = _range_to_move(tensor)
        return (
            end - begin >= self.options.min_bytes
            and end <= storage.nbytes()
            and storage._cdata not in self._owned
        )


@contextmanager
def offload_activations(
    model: nn.Module,
    layers: Sequence[nn.Module | str] | None = None,
    options: ActivationOptions | None = None,
) -> Iterator[ActivationOffload]:
    """Moves the tensors that are saved in forwards of `model` inside of the `with` block: see `ActivationOffload`.

        with offload_activations(model, options=ActivationOptions(device="nvme", nvme_path=folder)):
            for batch in data:
                model(batch).backward()
                ...

    Backwards must run inside of the block, too.
    """
    offload = ActivationOffload(options)
    offload.attach(model, layers)
    try:
        yield offload
    finally:
        offload.close()


class _Packing:
    """Our hook. A function cannot tell others what it does with parameters."""

    keeps_parameters = True
    """Parameters stay as they are. A package that gathers sharded parameters may thus enable hooks for these, and call
    this one for all other tensors."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        self._pack = pack

    def __call__(self, tensor: Tensor) -> Any:
        return self._pack(tensor)


class _Foreign:
    """A tensor that stays on the device, as the hooks have packed it that were enabled before ours."""

    __slots__ = ("_packed", "_unpack")

    def __init__(self, tensor: Tensor, outer: Hooks) -> None:
        pack, self._unpack = outer
        self._packed = pack(tensor)

    def restore(self) -> Tensor:
        return self._unpack(self._packed)


@opaque
def _unpack(packed: SavedTensor | KeptTensor | _Foreign) -> Tensor:
    return packed.restore()


def _calling(function: Callable[[], None]) -> Callable[..., None]:
    @opaque
    def hook(*_: object) -> None:
        function()

    return hook


def _enabled_hooks() -> Hooks | None:
    hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def _is_usable() -> bool:
    """Whether tensors that are saved now may be moved. In a backward they are needed at once; where activations are
    recomputed, torch's hooks must see every tensor; transforms of torch.func allow no hooks.
    """
    if torch._C._current_graph_task_id() != -1 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    hooks = _enabled_hooks()
    return hooks is None or getattr(hooks[0], "__module__", "") != "torch.utils.checkpoint"


def _range_to_move(tensor: Tensor) -> tuple[int, int]:
    """Returns which bytes of its storage are moved for a tensor: all, or only its own if these are few."""
    begin, end = byte_range(tensor)
    total = tensor.untyped_storage().nbytes()
    if total <= _PARTS * (end - begin):
        return 0, total
    return begin // _ALIGNMENT * _ALIGNMENT, end
