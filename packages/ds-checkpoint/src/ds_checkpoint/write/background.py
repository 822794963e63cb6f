"""Saves while training continues: a thread copies the state and writes it.

Memory is bounded: there is one copy, its buffers are reused, and a save waits for the previous one. A crash at any
moment has the same effect as in a synchronous save: the checkpoint is complete or absent.

[Note: deferred copies] Tensors that only an optimizer step changes (optimizer states, masters that are not the module's
parameters) need not be copied while training waits. The thread copies them during the next forward and backward, at
low priority, and the training thread copies the rest before the optimizer's next step. Parameters and buffers of the
module, which other code can change, are copied in the call, on two cores. If anything but a step changes a tensor
before it is copied, torch's version counter shows it, and the save fails instead of writing a mixture.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from ds_checkpoint.errors import CheckpointError
from ds_checkpoint.format import datafile
from ds_checkpoint.format.image import Image
from ds_checkpoint.format.records import Record, in_memory
from ds_checkpoint.interfaces import ShardRecord
from ds_checkpoint.team import Team
from ds_checkpoint.write.writer import Content, described, write

LATE_BYTES = 1 << 12
"""Smaller tensors are copied in the call, which costs less than tracking them."""
HELPED_BYTES = 4 << 20
"""Smaller copies are not worth a second thread."""
NICENESS = 10
"""Niceness of the thread: it gets about a tenth of a core that a training thread uses, too. It is not the maximum,
because the thread holds the GIL now and then.
"""


class _LateCopy:
    """Copies tensors into buffers in another thread, and delays the optimizer's step until all are copied."""

    def __init__(self, optimizer: Optimizer, image: Image, work: Sequence[tuple[str, Tensor, str]]) -> None:
        """`work`: name, tensor and key in the image of what is copied. Copies from an accelerator start at once."""
        self._image = image
        self._work = [(name, tensor, tensor._version) for name, tensor, _ in work]
        self._host = deque((tensor, key) for _, tensor, key in work if tensor.device.type == "cpu")
        self._on_host = bool(self._host)
        self._filled = threading.Event()
        self._checking = threading.Lock()
        self._changed: str | None = None
        others = [(t, image.place(key, t)) for _, t, key in work if t.device.type != "cpu"]
        self._copied = _on_a_stream_of_its_own(others)
        self._hook = _before_each_step_of(optimizer, self._hold_back)

    def _hold_back(self) -> None:
        """Called before a step, in the training thread. On an accelerator, the stream waits instead of the host."""
        self._check()
        if self._copied is not None:
            torch.accelerator.current_stream().wait_event(self._copied)
        if self._on_host:
            self._fill()
            self._filled.wait()

    def _check(self) -> None:
        """Records, once, which tensors were changed since the call: before the step, or earlier if all are copied."""
        with self._checking:
            for name, tensor, version in self._work:
                if tensor._version != version and self._changed is None:
                    self._changed = name
            self._work = []

    def _fill(self) -> None:
        """Copies the tensors that no other thread has started to copy. Several threads may call it."""
        for tensor, key in _taken(self._host):
            self._image.fill(key, tensor)

    def run(self) -> None:
        """Runs in the thread; returns when every buffer is filled.

        Raises:
            CheckpointError: a tensor was changed before it was copied.
        """
        try:
            self._fill()
            if self._copied is not None:
                self._copied.synchronize()
            self._check()
        finally:
            self._filled.set()
        if self._changed is not None:
            raise CheckpointError(
                f"{self._changed} was changed before it was copied, by something other than an optimizer step: "
                "call engine.wait_for_checkpoint() before you change states"
            )

    def cancel(self) -> None:
        """Cancels the copy before `run` was called."""
        self._host.clear()
        self._filled.set()

    def end(self) -> None:
        """Called in the training thread: returns when all is copied, and stops delaying steps."""
        self._hold_back()
        self._hook.remove()


T = TypeVar("T")


def _taken(work: deque[T]) -> Iterator[T]:
    """Yields the remaining items, each to one of the calling threads."""
    with suppress(IndexError):
        while True:
            yield work.popleft()


class _TwoCores:
    """Copies with a second thread, which is started in advance, because starting one takes as long as copying some
    megabytes.
    """

    def __init__(self) -> None:
        self._other = ThreadPoolExecutor(1, thread_name_prefix="ds-checkpoint-copy")

    def copy(self, image: Image, work: Sequence[tuple[Tensor, str]]) -> None:
        """Copies CPU tensors to their positions."""
        left = deque(work)

        def some() -> None:
            for data, key in _taken(left):
                image.copy(key, data)

        helped = None
        if sum(data.nbytes for data, _ in work) >= HELPED_BYTES:
            helped = self._other.submit(some)
        some()
        if helped is not None and not helped.cancel():
            helped.result()

    def close(self) -> None:
        self._other.shutdown()


def _yield_to_training() -> None:
    """Lowers the priority of this thread."""
    if sys.platform == "linux":  # on other systems it would apply to the whole process
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _before_each_step_of(optimizer: Optimizer, action: Callable[[], None]) -> RemovableHandle:
    """Not an optimizer hook: ds_zero's hook performs the whole step, and runs before hooks that were registered
    later.
    """
    wanted = weakref.ref(optimizer)

    def before(stepping: Optimizer, *_: object) -> None:
        if stepping is wanted():
            action()

    return register_optimizer_step_pre_hook(before)


def _on_a_stream_of_its_own(work: Sequence[tuple[Tensor, Tensor]]) -> torch.Event | None:
    """Starts copies from an accelerator on a stream of their own. Returns the event of their end."""
    if not work:
        return None
    here = torch.accelerator.current_stream()
    beside = torch.Stream(device=here.device)
    beside.wait_stream(here)
    with beside:
        for data, place in work:
            place.copy_(data, non_blocking=True)
    return beside.record_event()


class BackgroundSaver:
    """Writes one checkpoint at a time while training continues. All ranks must call each method with the same
    arguments.
    """

    def __init__(self, say: Callable[[str], None], optimizer: Optimizer | None = None) -> None:
        """
        Args:
            say: called with the message of a failure as soon as it happens.
            optimizer: its next step waits for late copies, [Note: deferred copies]. None: everything is copied in the
                call.
        """
        self._say = say
        self._optimizer = optimizer
        self._late: _LateCopy | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._image: Image | None = None
        self._cores: _TwoCores | None = None
        self._group: dist.ProcessGroup | None = None

    def save(self, root: Path, tag: str, content: Callable[[], Content], **options: Any) -> str:
        """Copies the state, starts writing, and returns the path of the future checkpoint.

        If the previous save failed, it warns: training continues, and the last complete checkpoint still exists.

        Raises:
            CheckpointError: on every rank, if any rank could not copy its state.
        """
        try:
            self.wait()
        except CheckpointError as error:
            warnings.warn(f"the previous checkpoint was not written: {error}", stacklevel=5)
        copy: Content | None = None
        failure: Exception | None = None
        try:
            copy = self._copied(content())
        except Exception as error:  # noqa: BLE001 - `settle` raises it on every rank
            failure = error
        try:
            Team().settle(failure, f"saving {root / tag}")
        except CheckpointError:
            if self._late is not None:
                self._late.cancel()
            self._let_go()
            raise
        assert copy is not None
        # A separate process group: collectives of two threads in one group would be matched with each other.
        if self._group is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self._thread = threading.Thread(
            target=self._work,
            args=(root, tag, copy, Team(self._group), self._late, options),
            name="ds-checkpoint",
        )
        # Not a daemon thread: a process that exits normally waits until its last checkpoint is complete.
        self._thread.start()
        return str(root / tag)

    def _work(
        self, root: Path, tag: str, copy: Content, team: Team, late: _LateCopy | None, options: dict[str, Any]
    ) -> None:
        """Runs in the thread."""
        _yield_to_training()
        failure: Exception | None = None
        try:
            if late is not None:
                late.run()  # before any collective, because the next step waits for it
        except Exception as error:  # noqa: BLE001 - `write` raises it on every rank
            failure = error

        def content() -> Content:
            if failure is not None:
                raise failure
            return copy

        try:
            write(root, tag, content, team=team, **options)
        except Exception as error:  # noqa: BLE001 - raised by `wait`
            self._failure = error
            if team.first:
                self._say(f"saving {root / tag} in the background failed; training continues: {error}")

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def hold(self) -> None:
        """Returns when everything is copied, so that training may change any tensor."""
        self._let_go()

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            CheckpointError: the checkpoint could not be written, and why.
        """
        self._join()
        failure, self._failure = self._failure, None
        if isinstance(failure, CheckpointError):
            raise failure
        if failure is not None:
            raise CheckpointError(f"{type(failure).__name__}: {failure}") from failure

    def close(self) -> None:
        """Waits, and frees buffers and process group. A failure is not raised: it was reported when it happened."""
        self._join()
        self._image = None
        if self._cores is not None:
            self._cores.close()
            self._cores = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._let_go()

    def _let_go(self) -> None:
        if self._late is not None:
            self._late.end()
            self._late = None

    def _copied(self, content: Content) -> Content:
        """Returns the current content, in an image of the file, part of which may be copied late."""
        items, _ = described(content)
        layout = datafile.layout(items)
        on_device = any(isinstance(item.data, Tensor) and item.data.device.type != "cpu" for item in items)
        if self._image is None or self._image.layout != layout:
            self._image = None  # only one of them exists
            self._image = Image(layout, pinned=on_device)
        image = self._image
        image.forget_sums()
        records: list[ShardRecord] = []
        late: list[tuple[str, Tensor, str]] = []
        now: list[tuple[Tensor, str]] = []
        for record, item in zip(content.records, items, strict=False):
            data = in_memory(item.data).detach()
            place = image.place(item.key, data)
            of = (record.fqn, record.state, record.global_shape, record.flat_offset)
            records.append(Record(*of, place, record.coordinates))
            waits = data.nbytes >= LATE_BYTES and isinstance(item.data, Tensor)
            if self._optimizer is not None and waits and content.only_stepped(record):
                late.append((f"{record.state} of {record.fqn!r}", data, item.key))
            elif not isinstance(item.data, Tensor):
                place.copy_(data)  # before the next one is loaded
            elif data.device.type == "cpu":
                now.append((data, item.key))
            else:
                place.copy_(data, non_blocking=True)
        if self._cores is None:
            self._cores = _TwoCores()
        self._cores.copy(image, now)
        blobs = {}
        for (name, blob), item in zip(content.blobs.items(), items[len(records) :], strict=True):
            data = in_memory(item.data)
            blobs[name] = image.place(item.key, data).copy_(data).view(blob.shape)
        if on_device:
            torch.accelerator.synchronize()
        if self._optimizer is not None and late:
            self._late = _LateCopy(self._optimizer, image, late)
        return Content(records=records, blobs=blobs, values=content.values, image=image)
