"""The ranks that write or read a checkpoint together: they share bytes, and they fail together.

Bytes travel as uint8 tensors; torch's object collectives would pickle them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_checkpoint.errors import CheckpointError

T = TypeVar("T")

LOST = "ds_checkpoint/lost"
"""Key of the store under which ranks say that a collective has broken."""
ANSWER_S = 10.0
"""How long ranks that are still there may take to say so, once a collective has broken."""


class Team:
    """All ranks of the default process group, or this process alone where there is none.

    [Note: a rank that is gone] A rank that dies breaks the collectives of its neighbours at once, but others wait for
    those neighbours, which have given up, until a timeout of half an hour. So the first rank to notice says so in the
    store of the process group; the others look there while they wait, and each names the ranks that do not answer.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """`group`: all ranks again, over gloo, for a thread of its own; default the default group."""
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

    def share(self, payload: bytes) -> bytes:
        """Rank 0's `payload`, on every rank."""
        if self.size == 1:
            return payload
        count = torch.tensor([len(payload)], dtype=torch.int64, device=self.device)
        self._finish(dist.broadcast(count, src=0, group=self._group, async_op=True))
        content = self._tensor(payload, int(count)) if self.first else self._tensor(b"", int(count))
        self._finish(dist.broadcast(content, src=0, group=self._group, async_op=True))
        return _bytes(content)

    def gather(self, payload: bytes) -> list[bytes]:
        """Every rank's `payload` in order on rank 0; empty elsewhere."""
        if self.size == 1:
            return [payload]
        lengths = self._lengths(len(payload))
        content = self._tensor(payload, max(lengths))
        parts = [torch.empty_like(content) for _ in lengths] if self.first else None
        self._finish(dist.gather(content, parts, dst=0, group=self._group, async_op=True))
        return [_bytes(part[:n]) for part, n in zip(parts, lengths, strict=True)] if parts is not None else []

    def together(self, doing: str, action: Callable[[], T]) -> T:
        """Do `action` on every rank; if it fails on any, raise one CheckpointError on all."""
        result: list[T] = []
        failure: Exception | None = None
        try:
            result.append(action())
        except Exception as error:  # noqa: BLE001 - `settle` raises it on every rank
            failure = error
        self.settle(failure, doing)
        return result[0]

    def by_first(self, doing: str, action: Callable[[], str]) -> str:
        """What `action` returns on rank 0, on every rank.

        Raises:
            FileNotFoundError, CheckpointError: on every rank, whatever goes wrong on rank 0; the first if that is one.
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
        """Wait for all ranks; if any of them has an `error`, raise one that names all of those, on every
        rank.

        A rank that raised alone would leave the others waiting in their next collective.
        """
        text = "" if error is None else _describe(error)
        if self.size == 1:
            failed = {0: text} if text else {}
        else:
            encoded = text.encode(errors="backslashreplace")
            lengths = self._lengths(len(encoded))
            if not any(lengths):
                return
            parts = [torch.empty(max(lengths), dtype=torch.uint8, device=self.device) for _ in lengths]
            mine = self._tensor(encoded, max(lengths))
            self._finish(dist.all_gather(parts, mine, group=self._group, async_op=True))
            texts = [_bytes(part[:n]).decode() for part, n in zip(parts, lengths, strict=True)]
            failed = {rank: said for rank, said in enumerate(texts) if said}
        if failed:
            raise CheckpointError(_summary(failed, self.size, doing)) from error

    def _lengths(self, mine: int) -> list[int]:
        counts = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        length = torch.tensor([mine], dtype=torch.int64, device=self.device)
        self._finish(dist.all_gather(counts, length, group=self._group, async_op=True))
        return [int(count) for count in counts]

    def _tensor(self, payload: bytes, length: int) -> Tensor:
        """`payload` followed by zeros, on the device that the backend can send from."""
        content = torch.frombuffer(bytearray(payload.ljust(max(length, 1), b"\0")), dtype=torch.uint8)
        return content[:length].to(self.device)

    # --- [Note: a rank that is gone]

    def _finish(self, work: dist.Work | None) -> None:
        """Wait for a collective.

        Raises:
            CheckpointError: it is broken, here or on another rank; names the ranks that do not answer.
        """
        assert work is not None
        pause_s, looked_s = 1e-4, time.monotonic()
        while not work.is_completed():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.01)
            if time.monotonic() - looked_s > 1.0:
                looked_s = time.monotonic()
                if self._is_broken():
                    raise CheckpointError(
                        self._who_is_gone("another rank has said that its connection broke")
                    )
        try:
            work.wait()
        except RuntimeError as error:
            raise CheckpointError(self._who_is_gone(str(error).splitlines()[0])) from error

    def _is_broken(self) -> bool:
        with suppress(RuntimeError, ValueError):
            return bool(_store().check([LOST]))
        return True  # the store itself is gone

    def _who_is_gone(self, why: str) -> str:
        """Say in the store that this rank is here, and look who else does."""
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
                f"ranks can no longer talk to each other, seen by rank {self.rank} ({why}); the process that keeps the "
                f"store does not answer either ({str(error).splitlines()[0]}): rank 0, or the launcher, has ended"
            )
        names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent[:8]))}"
        who = f"{names} did not answer within {ANSWER_S:.0f} s" if silent else "all ranks are still there"
        return (
            f"ranks can no longer talk to each other, seen by rank {self.rank} ({why}); {who}: look there for the "
            "cause. What was being saved is not there; the checkpoint before is"
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
