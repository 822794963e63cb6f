"""The rank processes, seen from pytest: started on demand, kept warm, replaced after a failure.

[Note: warm ranks] Each process of pytest (so each xdist worker) owns one zygote and as many ranks as its
largest test asked for; a test on n ranks uses the first n. Tests share nothing but the processes: each has
its own process group over its own FileStore (no ports that could clash), and after the body all ranks meet
at a barrier, which only succeeds if every rank issued the same collectives. Whatever goes wrong, the ranks
that took part are killed with their children, and the next test gets fresh ones.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import pytest

from harness.jobs import Body, Finish, Job, Kind, Report, pack_payload
from harness.verdict import Lost, RunResult

_START_S = 180.0  # importing torch, on a busy machine with a cold disk
_OUTPUT_CHARS = 20_000  # of one rank's output are shown, the last ones
_TESTS_FOLDER = str(Path(__file__).resolve().parent.parent)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds that ranks get for what is not the test's body."""

    after_failure_s: float = 1.0
    """For the other ranks to report what they saw."""
    after_skip_s: float = 10.0
    """For the other ranks to skip as well."""
    barrier_s: float = 10.0
    """For all ranks to meet after the body."""


class Zygote:
    """Our end of the process that forks the ranks."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = (
            f"import sys; sys.path.insert(0, {_TESTS_FOLDER!r}); from harness import zygote; "
            f"zygote.main({theirs.fileno()}, {os.getpid()})"
        )
        # A BLAS thread pool made at import would make forking unsafe. Each rank gets the test's environment
        # later.
        environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                env=environ,
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._socket.settimeout(_START_S)
        answer = self._answer("starting the rank processes")
        if answer != "ready":
            self.close()
            raise RuntimeError(f"no ranks can be started: {answer}")

    def fork(self, descriptors: Sequence[int]) -> int:
        """Starts a rank that owns these descriptors (connection, log, stacks); returns its process id."""
        socket.send_fds(self._socket, [b"fork"], list(descriptors))
        return int(self._answer("forking a rank"))

    def wait(self, pid: int) -> int:
        """Exit code of a rank that has ended or is about to; minus the signal's number if one killed it."""
        self._socket.send(f"wait {pid}".encode())
        return int(self._answer(f"waiting for process {pid}"))

    def close(self) -> None:
        """Ends the zygote, and by that every rank still alive."""
        self._socket.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self, doing: str) -> str:
        try:
            answer = self._socket.recv(4096)
        except TimeoutError:
            raise RuntimeError(f"{doing}: no answer within {_START_S:g} s") from None
        if not answer:
            raise RuntimeError(f"{doing}: the forking process ended; its error stands in pytest's stderr")
        return answer.decode()


class Rank:
    """One warm process."""

    def __init__(self, zygote: Zygote) -> None:
        ours, theirs = socket.socketpair()
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self.stacks: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self.pid = zygote.fork([theirs.fileno(), self.log.fileno(), self.stacks.fileno()])
        self.connection = Connection(ours.detach())
        self._zygote = zygote

    def dump_stacks(self) -> str:
        """Asks for the stacks of all threads and returns them; works while stuck in native code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        size, deadline = 0, time.monotonic() + 2.0
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, size = size, os.fstat(self.stacks.fileno()).st_size
            if size and size == before:
                break
        return os.pread(self.stacks.fileno(), 1 << 20, 0).decode(errors="replace")

    def take_output(self) -> str:
        """What was printed since the last call; empties the log."""
        size = os.fstat(self.log.fileno()).st_size
        text = os.pread(self.log.fileno(), _OUTPUT_CHARS, max(0, size - _OUTPUT_CHARS)).decode(
            errors="replace"
        )
        os.ftruncate(self.log.fileno(), 0)  # the rank's descriptor appends
        return (
            f"[the first {size - _OUTPUT_CHARS} bytes are not shown]\n{text}"
            if size > _OUTPUT_CHARS
            else text
        )

    def close(self) -> int:
        """Kills the process with its children; returns its exit status. Call once."""
        self.connection.close()
        # A rank that died a moment ago is a zombie until the zygote waits for it, so its number cannot be
        # reused, and its own status, not that of our signal, is what wait() returns.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self._zygote.wait(self.pid)
        self.log.close()
        self.stacks.close()
        return status


@dataclass
class _Progress:
    """Where one test stands."""

    outcomes: dict[int, Report | Lost]
    deadline_s: float


class Pool:
    """All ranks of one process of pytest. `num_forked` counts the processes ever started."""

    _KEY = pytest.StashKey["Pool"]()

    def __init__(self, limits: Limits | None = None) -> None:
        self.num_forked = 0
        self._limits = limits or Limits()
        self._ranks: list[Rank] = []
        self._zygote: Zygote | None = None
        self._folder = _own_folder()
        self._tests_run = 0

    @classmethod
    def of(cls, config: pytest.Config) -> Pool:
        """The pool of this run of pytest, made on first use and closed at its end."""
        pool = config.stash.get(cls._KEY, None)
        if pool is None:
            pool = config.stash[cls._KEY] = cls()
            config.add_cleanup(pool.close)
        return pool

    def close(self) -> None:
        """Ends all processes. The pool may be used again afterwards, from cold."""
        self._discard()
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(
        self,
        body: Body,
        world_size: int,
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        groups_may_stay: bool,
    ) -> RunResult:
        """Runs `body` on `world_size` ranks; never raises for what happens on them."""
        payload = pack_payload(arguments)
        self._grow(world_size)
        ranks = self._ranks[:world_size]
        self._folder.mkdir(exist_ok=True)
        self._tests_run += 1
        store = self._folder / f"store{self._tests_run}"
        port = _free_port()
        progress = _Progress({}, time.monotonic() + timeout_s)
        try:
            for i, rank in enumerate(ranks):
                _send(
                    rank,
                    Job(
                        body=body,
                        rank=i,
                        world_size=world_size,
                        timeout_s=timeout_s,
                        groups_may_stay=groups_may_stay,
                        store_file=str(store),
                        cwd=str(Path.cwd()),
                        environ=_environment(i, world_size, port),
                        sys_path=tuple(sys.path),
                        payload=payload,
                    ),
                )
            self._collect(ranks, progress)
            if _may_finish(progress.outcomes, world_size):
                self._finish(ranks, progress)
            return self._conclude(ranks, progress, timeout_s)
        except BaseException:  # Ctrl-C among others: nobody knows what the ranks are doing
            self._discard()
            raise
        finally:
            store.unlink(missing_ok=True)

    def _grow(self, world_size: int) -> None:
        if self._zygote is None:
            self._zygote = Zygote()
        while len(self._ranks) < world_size:
            self._ranks.append(Rank(self._zygote))
            self.num_forked += 1

    def _discard(self) -> None:
        while self._ranks:
            with contextlib.suppress(RuntimeError, OSError):  # a dead zygote has taken its ranks with it
                self._ranks.pop().close()

    def _collect(self, ranks: Sequence[Rank], progress: _Progress) -> None:
        """Waits until every rank has reported or died, or for the deadline, which a failure brings close."""
        outcomes = progress.outcomes
        by_connection = {rank.connection: i for i, rank in enumerate(ranks)}
        while by_connection:
            left_s = progress.deadline_s - time.monotonic()
            ready = wait(list(by_connection), timeout=max(0.0, left_s))
            if not ready:
                return
            for connection in ready:
                assert isinstance(connection, Connection)
                i = by_connection.pop(connection)
                outcome: Report | Lost
                try:
                    outcome = connection.recv()
                except (EOFError, OSError):
                    outcome = Lost(ranks[i].pid, 0, time.monotonic())  # its status follows in _conclude
                outcomes[i] = outcome
                progress.deadline_s = min(progress.deadline_s, time.monotonic() + self._grace_s(outcome))

    def _grace_s(self, outcome: Report | Lost) -> float:
        """How long the other ranks may go on once one has ended like this."""
        if _is_failure(outcome):
            return self._limits.after_failure_s
        assert isinstance(outcome, Report)
        return self._limits.after_skip_s if outcome.kind is not Kind.PASSED else float("inf")

    def _finish(self, ranks: Sequence[Rank], progress: _Progress) -> None:
        """Every rank has left the body in the same way: barrier, and the group down. Reports of failure
        replace those of the body."""
        bodies = dict(progress.outcomes)
        barrier = all(isinstance(o, Report) and o.in_group for o in bodies.values())
        for rank in ranks:
            _send(rank, Finish(self._limits.barrier_s if barrier else None))
        progress.outcomes.clear()
        progress.deadline_s = time.monotonic() + 2 * self._limits.barrier_s
        self._collect(ranks, progress)
        for i, outcome in progress.outcomes.items():
            if isinstance(outcome, Report) and outcome.kind is Kind.PASSED:
                progress.outcomes[i] = bodies[i]

    def _conclude(self, ranks: Sequence[Rank], progress: _Progress, timeout_s: float) -> RunResult:
        """Fills in the missing ranks, gathers output, and throws the processes away if one went wrong."""
        outcomes = progress.outcomes
        timed_out = not any(_is_failure(o) for o in outcomes.values())
        for i, rank in enumerate(ranks):
            if i not in outcomes:
                stacks = rank.dump_stacks() if timed_out else ""
                outcomes[i] = Lost(rank.pid, None, time.monotonic(), stacks, timed_out)
        output = "".join(_prefixed(i, rank.take_output()) for i, rank in enumerate(ranks))
        if not _are_reusable(outcomes.values()):
            del self._ranks[: len(ranks)]
            statuses = [rank.close() for rank in ranks]
            for i, outcome in outcomes.items():
                if isinstance(outcome, Lost) and outcome.status is not None:
                    outcomes[i] = Lost(outcome.pid, statuses[i], outcome.when_s)
        return RunResult(tuple(outcomes[i] for i in range(len(ranks))), timeout_s, output)


def _own_folder() -> Path:
    """A new folder for the stores; those of processes that were killed before they could remove theirs go."""
    for stale in Path(tempfile.gettempdir()).glob("ds-ranks-*-*"):
        owner = stale.name.split("-")[2]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"ds-ranks-{os.getpid()}-"))


def _send(rank: Rank, message: Job | Finish) -> None:
    with contextlib.suppress(OSError):  # it died: the wait that follows finds its connection closed
        rank.connection.send(message)


def _are_reusable(outcomes: Collection[Report | Lost]) -> bool:
    """Whether the ranks agree and are intact. A rank whose body took the group down is not: torch names groups
    by a counter, which is then no longer the same on all ranks."""
    reports = [o for o in outcomes if isinstance(o, Report) and o.kind is not Kind.FAILED and o.in_group]
    return len(reports) == len(outcomes) and len({o.kind for o in reports}) == 1


def _is_failure(outcome: Report | Lost) -> bool:
    return isinstance(outcome, Lost) or outcome.kind is Kind.FAILED


def _may_finish(outcomes: Mapping[int, Report | Lost], world_size: int) -> bool:
    if len(outcomes) < world_size or any(_is_failure(o) for o in outcomes.values()):
        return False
    return len({o.kind for o in outcomes.values() if isinstance(o, Report)}) == 1


def _prefixed(rank: int, text: str) -> str:
    return "".join(f"[rank {rank}] {line}\n" for line in text.splitlines())


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment of pytest now (a test may have patched it) and what torchrun sets for a rank."""
    return {
        **os.environ,
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),  # works without any network
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    """For bodies that start a process group of their own; the harness itself uses no port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
