"""The ranks that write or read a checkpoint together. They exchange bytes, and an error on one is raised on all.

Bytes are sent as uint8 tensors; torch's object collectives would pickle them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_checkpoint.errors import CheckpointError, LostRanksError

T = TypeVar("T")

LOST = "ds_checkpoint/lost"
"""Key in the process group's store under which ranks report that a collective has failed."""
ANSWER_S = 10.0
"""Seconds in which the remaining ranks must answer after a collective has failed."""


class Team:
    """All ranks of the default process group, or this process alone if there is none.

    [Note: ranks that end] If the process of a rank ends, the collectives of the ranks connected to it fail at once,
    but other ranks would wait for these until the timeout of half an hour. So the first rank whose collective fails
    writes this to the store of the process group. The others check the store while they wait, and the error of each
    rank names the ranks that do not answer.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: a gloo group of all ranks, for use in another thread. Default: the default process group."""
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = torch.device("cpu")
        self._group = group
        if group is None and self.size > 1 and "gloo" not in dist.get_backend_config():
            accelerator = torch.accelerator.current_accelerator()
            assert accelerator is not None
            self.device = torch.device(accelerator.type, torch.accelerator.current_device_index())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, payload: bytes, source: int = 0) -> bytes:
        """Returns the `payload` of one rank on every rank."""
        if self.size == 1:
            return payload
        count = torch.tensor([len(payload)], dtype=torch.int64, device=self.device)
        self._finish(dist.broadcast(count, src=source, group=self._group, async_op=True))
        content = self._tensor(payload if self.rank == source else b"", int(count))
        self._finish(dist.broadcast(content, src=source, group=self._group, async_op=True))
        return _bytes(content)

    def gather(self, payload: bytes) -> list[bytes]:
        """Returns every rank's `payload`, in order, on rank 0; an empty list on other ranks."""
        if self.size == 1:
            return [payload]
        lengths = self._lengths(len(payload))
        content = self._tensor(payload, max(lengths))
        parts = [torch.empty_like(content) for _ in lengths] if self.first else None
        self._finish(dist.gather(content, parts, dst=0, group=self._group, async_op=True))
        return [_bytes(part[:n]) for part, n in zip(parts, lengths, strict=True)] if parts is not None else []

    def exchange(self, payload: bytes) -> list[bytes]:
        """Returns every rank's `payload`, in order, on every rank. For short ones: all take the room of the longest."""
        if self.size == 1:
            return [payload]
        lengths = self._lengths(len(payload))
        if not any(lengths):
            return [b""] * self.size
        parts = [torch.empty(max(lengths), dtype=torch.uint8, device=self.device) for _ in lengths]
        mine = self._tensor(payload, max(lengths))
        self._finish(dist.all_gather(parts, mine, group=self._group, async_op=True))
        return [_bytes(part[:n]) for part, n in zip(parts, lengths, strict=True)]

    def watch(self, communicate: Callable[[], T]) -> T:
        """Calls `communicate`, which sends to and receives from single ranks. It must not fail for another reason
        than a lost connection.

        Raises:
            LostRanksError: a connection failed, here or on another rank.
        """
        # The works of gloo's `isend` and `irecv` do not say whether they are completed: `wait` has to be called.
        result: Future[T] = Future()

        def run() -> None:
            try:
                result.set_result(communicate())
            except BaseException as error:  # noqa: BLE001 - raised below
                result.set_exception(error)

        threading.Thread(target=run, name="ds-checkpoint-peers", daemon=True).start()
        while True:
            try:
                return result.result(timeout=1.0)
            except FutureTimeoutError:
                if self._is_broken():
                    why = "another rank reported that its connection failed"
                    raise LostRanksError(self._who_is_gone(why)) from None
            except RuntimeError as error:
                raise LostRanksError(self._who_is_gone(str(error).splitlines()[0])) from error

    def together(self, doing: str, action: Callable[[], T]) -> T:
        """Calls `action` on every rank. If it fails on any, raises the same CheckpointError on all."""
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(action())
        except Exception as error:  # noqa: BLE001 - `settle` raises it on every rank
            failure = error
        self.settle(failure, doing)
        return result[0]

    def by_first(self, doing: str, action: Callable[[], str]) -> str:
        """Calls `action` on rank 0, and returns its result on every rank.

        Raises:
            FileNotFoundError, CheckpointError: on every rank, if `action` fails on rank 0; FileNotFoundError if it
                raised that.
        """
        answer: dict[str, str] = {"result": ""}
        if self.first:
            try:
                answer["result"] = action()
            except FileNotFoundError as error:
                answer["missing"] = str(error)
            except Exception as error:  # noqa: BLE001 - raised below, on every rank
                answer["failure"] = _describe(error)
        answer = dict(json.loads(self.share(json.dumps(answer).encode())))
        if "missing" in answer:
            raise FileNotFoundError(answer["missing"])
        if "failure" in answer:
            raise CheckpointError(f"{doing} failed on rank 0: {answer['failure']}")
        return answer["result"]

    def settle(self, error: Exception | None, doing: str) -> None:
        """Waits for all ranks. If any of them has an `error`, raises an error on every rank that names them all.

        If a rank raised alone, the others would wait in their next collective.
        """
        text = "" if error is None else _describe(error)
        texts = [part.decode() for part in self.exchange(text.encode(errors="backslashreplace"))]
        failed = {rank: said for rank, said in enumerate(texts) if said}
        if failed:
            raise CheckpointError(_summary(failed, self.size, doing)) from error

    def _lengths(self, mine: int) -> list[int]:
        counts = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        length = torch.tensor([mine], dtype=torch.int64, device=self.device)
        self._finish(dist.all_gather(counts, length, group=self._group, async_op=True))
        return [int(count) for count in counts]

    def _tensor(self, payload: bytes, length: int) -> Tensor:
        """Returns `payload` padded with zeros, on a device from which the backend can send."""
        content = torch.frombuffer(bytearray(payload.ljust(max(length, 1), b"\0")), dtype=torch.uint8)
        return content[:length].to(self.device)

    # --- [Note: ranks that end]

    def _finish(self, work: dist.Work | None) -> None:
        """Waits for a collective.

        Raises:
            LostRanksError: the collective failed, here or on another rank. The message names the ranks that do not
                answer.
        """
        assert work is not None
        pause_s, looked_s = 1e-4, time.monotonic()
        while not work.is_completed():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.01)
            if time.monotonic() - looked_s > 1.0:
                looked_s = time.monotonic()
                if self._is_broken():
                    raise LostRanksError(
                        self._who_is_gone("another rank reported that its connection failed")
                    )
        try:
            work.wait()
        except RuntimeError as error:
            raise LostRanksError(self._who_is_gone(str(error).splitlines()[0])) from error

    def _is_broken(self) -> bool:
        with suppress(RuntimeError, ValueError):
            return bool(_store().check([LOST]))
        return True  # the store does not answer

    def _who_is_gone(self, why: str) -> str:
        """Reports in the store that this rank is alive, and returns an error that names the ranks that do not."""
        silent = list(range(self.size))
        silent.remove(self.rank)
        try:
            store = _store()
            store.set(f"{LOST}/{self.rank}", "here")
            store.set(LOST, "")
            end_s = time.monotonic() + ANSWER_S
            while silent and time.monotonic() < end_s:
                time.sleep(0.05)
                silent = [rank for rank in silent if not store.check([f"{LOST}/{rank}"])]
        except (RuntimeError, ValueError) as error:
            return (
                f"the ranks have lost their connection, noticed by rank {self.rank} ({why}); the process with the "
                f"store does not answer either ({str(error).splitlines()[0]}): rank 0, or the launcher, has ended"
            )
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent[:8]))}"
        who = f"{names} did not answer within {ANSWER_S:.0f} s" if silent else "all ranks are still running"
        return (
            f"the ranks have lost their connection, noticed by rank {self.rank} ({why}); {who}: look at their "
            "output for the cause. The checkpoint that was being written does not exist; the previous one does"
        )


def _store() -> torch._C._distributed_c10d.Store:
    return dist.distributed_c10d._get_default_store()


def _bytes(content: Tensor) -> bytes:
    return bytes(content.cpu().numpy().tobytes())


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


def _summary(failed: dict[int, str], size: int, doing: str) -> str:
    if size == 1:
        return f"{doing} failed: {next(iter(failed.values()))}"
    reasons: dict[str, list[int]] = {}
    for rank, text in failed.items():
        reasons.setdefault(text, []).append(rank)
    lines = [
        f"rank{'s' if len(ranks) > 1 else ''} "
        f"{', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''}: {text}"
        for text, ranks in reasons.items()
    ]
    return f"{doing} failed on {len(failed)} of {size} ranks; " + "; ".join(lines)
