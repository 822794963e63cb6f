"""Detects stalled ranks, and makes all of them raise instead of waiting forever.

[Note: detection of stalled ranks]
A thread per model checks a few times per `order_timeout_s` whether its rank makes progress. While it does, the thread
only writes a heartbeat into the process group's store. A rank without progress for half of `order_timeout_s` writes
its `Standing` into the store, and renews it at every check. After 0.7 `order_timeout_s`, the first of the waiting ranks
logs what every rank does. Once all ranks have reported twice that they stall at the same place, `order.judge` decides,
with the same result on every rank. The rank that decides writes the error into the store and closes its connections.
This wakes threads that are blocked in a collective, on this rank and on others. A rank without a heartbeat is treated
as dead.

A rank whose connection breaks also writes its standing and closes its other connections. The ranks that wait for it
notice this at once, and do the same. After a few seconds each of them names the ranks that have neither written a
standing nor sent a heartbeat.

A rank whose own disk fails writes its error into the store, and closes its connections, so that the others raise it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ds_zero.comm.abort import AbortFlag
from ds_zero.comm.order import OrderLog, RankOrderError, Standing, judge, lost, lost_store, name_ranks
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.thread_place import module_of, place_of
from ds_zero.interfaces import ShardStoreError, Work

_LOOKS = 8
"""Number of checks per `order_timeout_s`."""
_TICK_S = 2.0
"""Maximum seconds between two checks. Below `_ANSWER_S`, so that a heartbeat arrives in that time."""
_PATIENCE = 4
"""Multiple of `order_timeout_s` after which ranks that ran the same events so far count as stuck, and a rank without a
heartbeat as dead."""
_REPORT = 0.7
"""Fraction of `order_timeout_s` after which a stalled rank reports what every rank does. Together with the interval
of the checks it stays below `order_timeout_s`."""
_ANSWER_S = 5.0
"""Seconds that a rank with a broken connection waits for the reports of other ranks."""
_BROKEN = ("Connection", "closed", "pair closure", "Timed out", "timeout", "NCCL", "gloo", "Socket", "abort")
"""Words in the error of a broken connection."""

_COMPUTING = ("ds_zero.prove.reference_training", "ds_zero.prove.deviation")
"""Modules of this package that may compute for a long time while other ranks wait."""

_log = logging.getLogger("ds_zero")


class Store(Protocol):
    """The methods of `torch.distributed.Store` that are used here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


class Waiting:
    """Waits without detection, for a single rank and for `order_timeout_s` 0."""

    def __init__(self) -> None:
        self.log = OrderLog()

    def wait(self, work: Work, what: str) -> None:
        work.wait()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        yield

    def fail(self, reason: str) -> None:
        """Makes the other ranks raise, which would wait for this one in vain. Without detection it has no effect."""

    def stop(self) -> None:
        return None


class StallWatch(Waiting):
    """Detects stalled ranks of a model, on one rank, [Note: detection of stalled ranks]."""

    def __init__(
        self,
        store: Store,
        token: str,
        place: tuple[int, int],
        groups: Sequence[dist.ProcessGroup],
        abort: AbortFlag,
        timeout_s: float,
    ) -> None:
        """
        Args:
            token: identifies this model in the store.
            place: index of this rank, and the number of ranks.
            groups: process groups whose connections are closed to wake blocked threads.
            abort: raised for the same purpose.
            timeout_s: `ZeroConfig.order_timeout_s`.
        """
        super().__init__()
        self._store, self._token, self._groups, self._timeout_s = store, token, groups, timeout_s
        self._abort = abort
        self._index, self._size = place
        self._global_rank = dist.get_rank()
        self._verdict: str | None = None
        self._seen = -1
        self._stalled_since = time.monotonic()
        self._written = ""
        """The standing of this rank in the store, as text."""
        self._beat = 0
        self._first: Mapping[int, Standing] = {}
        """First report of each rank at the place where it stalls."""
        self._warned = False
        self._broken = False
        self._standing_lock = threading.Lock()
        """Held while this rank's standing is written or removed, so that the watching thread cannot replace the last
        one of the training thread."""
        self._heartbeats: dict[int, tuple[str, float]] = {}
        """Rank -> its last heartbeat, and when it was first seen."""
        self._stopped = threading.Event()
        self.looks = 0
        """Number of checks so far."""
        weakref.finalize(self, self._stopped.set)
        self._tick_s = min(max(timeout_s / _LOOKS, 0.02), _TICK_S)
        self._watcher = threading.Thread(
            target=_check_repeatedly,
            args=(weakref.ref(self), self._stopped, self._tick_s),
            name="ds_zero.comm.watchdog",
            daemon=True,
        )
        self._watcher.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if threading.current_thread() is not self._watcher:
            self._watcher.join()

    # --- the training thread

    def wait(self, work: Work, what: str) -> None:
        """Waits for `work`. If its connection breaks, raises an error that describes all ranks."""
        with self.guard(what):
            work.wait()

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """The same as a context manager around collectives."""
        outer = self.log.waiting
        self.log.waiting = outer or what
        try:
            yield
        except (RuntimeError, OSError) as error:
            if _is_own(error):
                self._tell(what, error)
                raise
            explained = self._explained(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            self.log.waiting = outer

    def _tell(self, what: str, error: Exception) -> None:
        who = f"rank {self._global_rank} failed in {what}, and cannot go on"
        self.fail(f"{who}: {type(error).__name__}: {error}")

    def fail(self, reason: str) -> None:
        if self._verdict is None:
            self._verdict = reason
            with suppress(RuntimeError):  # from the store
                self._store.set(self._key("verdict"), self._verdict)
            self._close()

    def _explained(self, error: RuntimeError | OSError) -> RuntimeError | OSError:
        if isinstance(error, RankOrderError) or not any(word in str(error) for word in _BROKEN):
            return error
        said = str(error).splitlines()[0][:200]
        try:
            return RankOrderError(self._describe_broken(said))
        except RuntimeError:  # from the store
            return RankOrderError(lost_store(self._standing(blocked=True), _store_holder(), said))

    def _describe_broken(self, error: str) -> str:
        """Returns the message for a broken connection, from the reports and heartbeats of all ranks."""
        self._write_standing(blocked=True, broken=True)
        before = self._beats()
        if self._read_verdict() is None:
            self._close()
        answers: dict[int, Standing] = {}
        message = ""
        deadline = time.monotonic() + max(min(_ANSWER_S, self._timeout_s), 1.5 * self._tick_s)
        try:
            while (verdict := self._read_verdict()) is None:
                beating = {rank for rank, sign in self._beats().items() if sign != before[rank]}
                # A standing without a heartbeat may be that of a rank that ended while it waited.
                answers = {r: s for r, s in self._read_standings().items() if s.broken or r in beating}
                missing = [rank for rank in range(self._size) if rank not in answers]
                silent = self._global([rank for rank in missing if rank not in beating])
                message = lost(answers, silent, self._global([r for r in missing if r in beating]), error)
                verdict = judge(answers, self._size, patient=True)
                if verdict is None and time.monotonic() > deadline:
                    verdict = message
                if verdict is not None:
                    self._store.set(self._key("verdict"), verdict)  # so that all ranks raise the same message
                    break
                time.sleep(0.05)
        except RuntimeError:  # from the store
            if not any(standing.rank == 0 and standing.broken for standing in answers.values()):
                raise
            return message  # rank 0, which held the store, has raised its error and ended
        return verdict

    # --- the watching thread

    def look(self) -> None:
        """One check of the thread: writes a heartbeat and, if this rank stalls, reports it."""
        self.looks += 1
        if self._broken:
            return
        now = time.monotonic()
        self._store.set(self._key(f"alive/{self._index}"), f"{self._global_rank}:{self.looks}")
        if self.log.count != self._seen:
            self._seen, self._stalled_since, self._warned = self.log.count, now, False
            self._heartbeats.clear()
            self._remove_standing()
            return
        stalled_s = now - self._stalled_since
        if stalled_s < self._timeout_s / 2:
            return
        if self._verdict is None:
            self._report_stall(stalled_s)
        elif self.log.waiting:
            self._wake()

    def _report_stall(self, stalled_s: float) -> None:
        blocked = self._blocked()
        self._write_standing(blocked=blocked)
        if not blocked:
            self._first = {}
            return
        verdict = self._read_verdict() or self._decide(stalled_s)
        if verdict:
            if not self.log.waiting:
                _log.error("%s", verdict)
            self._wake()

    def _decide(self, stalled_s: float) -> str | None:
        """Decides once every rank has reported twice that it stalls at the same place."""
        standings = self._read_standings()
        same = {r: s for r, s in standings.items() if (old := self._first.get(r)) and old.count == s.count}
        confirmed = {r: s for r, s in same.items() if s.beat > self._first[r].beat}
        for rank, standing in standings.items():
            if rank not in same:
                self._first = {**self._first, rank: standing}
        patient = stalled_s >= _PATIENCE * self._timeout_s
        silent_s = self._silences()
        gone = [rank for rank, seconds in silent_s.items() if seconds >= (_PATIENCE - 1) * self._timeout_s]
        if gone:
            present = {rank: standing for rank, standing in standings.items() if rank not in gone}
            running = [rank for rank in range(self._size) if rank not in present and rank not in gone]
            verdict: str | None = lost(
                present, self._global(gone), self._global(running), f"no heartbeat for {stalled_s:.0f} s"
            )
        else:
            verdict = judge(confirmed, self._size, patient=patient)
        if verdict is not None:
            self._verdict = verdict
            self._store.set(self._key("verdict"), verdict)
        elif stalled_s >= _REPORT * self._timeout_s and not self._warned:
            self._warned = True
            self._warn(
                standings, [r for r, s in silent_s.items() if s > 1.5 * self._timeout_s / _LOOKS], stalled_s
            )
        return verdict

    def _silences(self) -> dict[int, float]:
        """Returns the seconds since the last heartbeat of each other rank. If a process or its machine ends without
        closing a connection, this is the only sign of it.
        """
        now = time.monotonic()
        for rank, beat in self._beats().items():
            if rank not in self._heartbeats or self._heartbeats[rank][0] != beat:
                self._heartbeats[rank] = beat, now
        return {rank: now - since for rank, (_, since) in self._heartbeats.items() if rank != self._index}

    def _beats(self) -> dict[int, str]:
        """Returns the last heartbeat of each rank; "" for a rank without one."""
        return {rank: self._get(self._key(f"alive/{rank}")) for rank in range(self._size)}

    def _global(self, ranks: Sequence[int]) -> list[int]:
        """Returns the global ranks for ranks of this model, which their heartbeats contain."""
        beats = self._beats()
        return [int(beats[rank].partition(":")[0] or rank) for rank in ranks]

    def _warn(self, standings: Mapping[int, Standing], silent: Sequence[int], stalled_s: float) -> None:
        """Logs what each rank does, on the first of the waiting ranks."""
        if self._index != min(rank for rank, standing in standings.items() if standing.blocked):
            return
        clauses = [
            f"rank {s.rank} waits for {s.waiting or 'other ranks'} at {s.where}"
            if s.blocked
            else f"rank {s.rank} is at {s.where}"
            for s in standings.values()
        ]
        running = [r for r in range(self._size) if r not in standings and r not in silent]
        if running:
            clauses.append(
                f"{name_ranks(running)} (of this model's {self._size}) are running, and wait for no rank"
            )
        if missing := [r for r in silent if r not in standings]:
            clauses.append(f"{name_ranks(missing)} send no heartbeat")
        _log.warning(
            "ranks have waited %.0f s for each other: %s. All ranks must make the same calls that communicate "
            "(forward, backward, step, saving, evaluation, generation)",
            stalled_s,
            "; ".join(clauses),
        )

    def _write_standing(self, *, blocked: bool, broken: bool = False) -> None:
        """Writes the standing of this rank into the store."""
        with self._standing_lock:
            if self._broken and not broken:
                return
            self._broken = broken
            self._written = self._standing(blocked=blocked).to_json()
            self._store.set(self._key(self._index), self._written)

    def _remove_standing(self) -> None:
        """Removes it from the store, since this rank makes progress again."""
        with self._standing_lock:
            if self._written and not self._broken:
                self._written = ""
                self._store.set(self._key(self._index), "")

    def _standing(self, *, blocked: bool) -> Standing:
        self._beat += 1
        return Standing(
            rank=self._global_rank,
            count=self.log.count,
            recent=self.log.recent(),
            waiting=self.log.waiting,
            blocked=blocked,
            where=place_of(self.log.thread_id),
            beat=self._beat,
            broken=self._broken,
        )

    def _read_standings(self) -> dict[int, Standing]:
        """Returns the standings in the store, by rank."""
        standings: dict[int, Standing] = {}
        for rank in range(self._size):
            text = self._get(self._key(rank))
            if text:
                standings[rank] = Standing.from_json(text)
        return standings

    def _read_verdict(self) -> str | None:
        self._verdict = self._verdict or self._get(self._key("verdict")) or None
        return self._verdict

    def _get(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _key(self, name: int | str) -> str:
        return f"ds_zero/{self._token}/{name}"

    def _blocked(self) -> bool:
        """Whether the training thread waits for other ranks."""
        frame = sys._current_frames().get(self.log.thread_id)
        name = module_of(frame) if frame is not None else ""
        inside = name.startswith(("torch.distributed", "ds_zero")) and name not in _COMPUTING
        return bool(self.log.waiting) or inside

    def _wake(self) -> None:
        """Closes all connections, so that threads that are blocked in collectives raise."""
        self._close()
        for group in self._groups:
            if "gloo" not in dist.get_backend(group):
                group.abort()

    def _close(self) -> None:
        """Closes the connections of gloo and those to peers' memory, which the other ranks notice at once."""
        self._abort.set()
        for group in self._groups:
            if "gloo" not in dist.get_backend(group):
                continue
            # gloo has no function for this, but a wait that times out closes all connections of the group. If the
            # connection to one rank is closed already, the wait fails at once, and the next rank is tried.
            for step in range(1, group.size()):
                try:
                    other = (group.rank() + step) % group.size()
                    nothing = dist.irecv(torch.zeros(1), group=group, group_src=other, tag=0x5A11)
                    assert nothing is not None
                    nothing.wait(timedelta(milliseconds=1))
                except RuntimeError:  # the timeout, or a closed connection
                    continue


def _check_repeatedly(pointer: weakref.ref[StallWatch], stopped: threading.Event, tick_s: float) -> None:
    while not stopped.wait(tick_s):
        watch = pointer()
        if watch is None or not dist.is_initialized():
            return
        try:
            watch.look()
        except (RuntimeError, ValueError) as error:
            # The process that held the store has ended. Connections to it break without this thread.
            _log.debug("ds_zero stops the detection of stalled ranks: %s", error)
            return
        del watch


def _is_own(error: Exception) -> bool:
    """Whether an error arose on this rank, from its disk or memory, so that the others do not know of it."""
    return isinstance(error, ShardStoreError) or any(
        isinstance(e, OSError) and not isinstance(e, (ConnectionError, ProcessLookupError, TimeoutError))
        for e in (error, error.__cause__)
    )


def watch_ranks(
    ranks: Ranks, others: Sequence[Ranks], timeout_s: float, abort: AbortFlag, device: torch.device
) -> Waiting:
    """Starts the detection of stalled ranks for one model. Collective: the ranks agree on a name in the store.

    Args:
        others: ranks of other axes, whose connections are closed, too.
    """
    groups = {id(a.group): a.group for r in (ranks, *others) for a in r.axes if a.group is not None}
    if not groups or timeout_s == 0 or not all(_is_watched(g) for g in groups.values()):
        return Waiting()
    store = _store()
    if store is None:
        return Waiting()
    token = torch.tensor([int.from_bytes(os.urandom(7), "big")], device=device)
    for axis in ranks.axes:
        if axis.group is not None:
            dist.broadcast(token, group=axis.group, group_src=0)
    across = ranks.replicas.rank if ranks.replicas is not None else 0
    place = across * ranks.size + ranks.rank, ranks.total
    return StallWatch(store, f"{int(token.item()):x}", place, list(groups.values()), abort, timeout_s)


def _is_watched(group: dist.ProcessGroup) -> bool:
    """Whether the group connects real processes, which can wait for each other forever."""
    try:
        backend = dist.get_backend(group)
    except ValueError:  # torch does not know the group
        return False
    return any(known in backend for known in ("gloo", "nccl", "xccl", "hccl"))


def note_steps(optimizer: Optimizer, log: OrderLog) -> RemovableHandle:
    """Logs the steps of the optimizer."""

    def before(*_: object) -> None:
        log.note("step", "")

    handle: RemovableHandle = optimizer.register_step_pre_hook(before)
    return handle


def _store_holder() -> str:
    """Returns who holds the store of the default process group, in words."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def _store() -> Store | None:
    """Returns the store of the default process group, with a separate connection if possible, because the training
    thread may be blocked in the other one.
    """
    if not dist.is_initialized():
        return None
    try:
        store = dist.distributed_c10d._get_default_store()
    except (RuntimeError, ValueError):
        return None
    clone = getattr(store, "clone", None)
    if clone is not None:
        try:
            own: Store = clone()
        except (RuntimeError, NotImplementedError):
            return store
        return own
    return store
