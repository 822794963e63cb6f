"""A ShardStore that is no identity in disguise: it keeps bytes that no tensor looks into, and is late."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ds_zero.interfaces import Reservation, ShardKey, Work
from ds_zero.params.stores import ResidentStore

KINDS = ("param", "master", "grad")


class LateWork:
    """Does what it has to do in `wait`, or in a thread."""

    def __init__(self, act: Callable[[], object], done: Callable[[], None], *, in_thread: bool) -> None:
        self._act, self._done = act, done
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run) if in_thread else None
        if self._thread is not None:
            self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        else:
            self._run()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._error = error
        finally:
            self._done()


class DistantStore:
    """Keeps tensors of `away` as bytes, and maps the others.

    Sources are read, and targets written, only when a work is done. So a caller that changes a source too early, or
    reads a target too early, trains to other bits. A second work on a key while the first is under way fails.
    """

    def __init__(self, away: Collection[str] = KINDS, *, in_thread: bool = False) -> None:
        self.away = frozenset(away)
        self.calls: Counter[tuple[str, str]] = Counter()
        """How often what was called, by action and kind."""
        self.staged_bytes: Counter[int] = Counter()
        """Bytes of staging memory by number of elements."""
        self.log: list[tuple[str, ShardKey]] = []
        """Starts and ends of works: "load", "load done", ..."""
        self.fails: dict[tuple[str, str], Exception] = {}
        """By action and kind, what the next such work raises when it is waited for."""
        self._in_thread = in_thread
        self._mapped = ResidentStore()
        self._bytes: dict[ShardKey, bytearray] = {}
        self._dtypes: dict[ShardKey, torch.dtype] = {}
        self._busy: set[ShardKey] = set()

    def reserve(self, plan: Sequence[Reservation]) -> Mapping[ShardKey, Tensor]:
        for item in plan:
            if item.key.kind in self.away:
                self._bytes[item.key] = bytearray(item.numel * item.dtype.itemsize)
                self._dtypes[item.key] = item.dtype
        return self._mapped.reserve([item for item in plan if item.key.kind not in self.away])

    def staging(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.staged_bytes[numel] += numel * dtype.itemsize
        made = torch.empty(numel, dtype=dtype, device=device)
        return made.fill_(float("nan") if dtype.is_floating_point else 0xFF)

    def load(self, key: ShardKey, out: Tensor) -> Work:
        if key not in self._bytes:
            return self._mapped.load(key, out)
        return self._work("load", key, lambda: out.copy_(self._tensor(key)))

    def store(self, key: ShardKey, src: Tensor) -> Work:
        if key not in self._bytes:
            return self._mapped.store(key, src)
        return self._work("store", key, lambda: self._put(key, src.to(self._dtypes[key]), 0))

    def sink_grad(self, key: ShardKey, grad: Tensor, *, offset: int, accumulate: bool) -> Work:
        if key not in self._bytes:
            return self._mapped.sink_grad(key, grad, offset=offset, accumulate=accumulate)

        def act() -> None:
            old = self._tensor(key)[offset : offset + grad.numel()]
            self._put(key, old.add_(grad) if accumulate else grad.to(old.dtype), offset)

        return self._work("sink_grad", key, act)

    def release(self, key: ShardKey) -> None:
        self._bytes.pop(key, None)
        self._mapped.release(key)

    def close(self) -> None:
        assert not self._busy, "closed while works are under way"
        self._bytes.clear()
        self._mapped.close()

    def _tensor(self, key: ShardKey) -> Tensor:
        held = self._bytes[key]
        if not held:
            return torch.empty(0, dtype=self._dtypes[key])
        return torch.frombuffer(bytearray(held), dtype=self._dtypes[key])

    def _put(self, key: ShardKey, values: Tensor, offset: int) -> None:
        width = values.element_size()
        data = (
            values.detach().contiguous().view(torch.uint8).numpy()
            if values.numel()
            else np.empty(0, np.uint8)
        )
        self._bytes[key][offset * width : (offset + values.numel()) * width] = data.tobytes()

    def _work(self, action: str, key: ShardKey, act: Callable[[], object]) -> Work:
        assert key not in self._busy, f"{action} of {key} while another work on it is under way"
        self._busy.add(key)
        self.calls[action, key.kind] += 1
        self.log.append((action, key))

        def run() -> None:
            error = self.fails.pop((action, key.kind), None)
            if error is not None:
                raise error
            act()

        def done() -> None:
            self._busy.discard(key)
            self.log.append((f"{action} done", key))

        return LateWork(run, done, in_thread=self._in_thread)
