"""Where the output of the ranks goes: this terminal, and a file for each rank."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path

from ds_engine.launch.output import Copies, LogFile, Nowhere, Outputs, PassThrough, Prefixed, Sink
from ds_engine.launch.plan import LaunchError

_STDOUT, _STDERR = 1, 2


class Console:
    """Makes the sinks of each rank.

    Rank 0 writes to our stdout, and to our stderr through a channel that forwards every byte. The lines of other ranks
    get a prefix.

    logs: folder of the log files; None for none.
    only_rank_0: other ranks are not shown.
    inherit: rank 0 may have our stdout itself, because it runs on this machine.
    """

    while_blocked: Callable[[], None] | None = None
    """Is called again and again while the terminal accepts nothing. Set before the sinks are made."""

    def __init__(
        self,
        say: Callable[[str], None],
        *,
        logs: Path | None = None,
        only_rank_0: bool = False,
        inherit: bool,
    ) -> None:
        self._say = say
        self._logs = logs
        self._only_rank_0 = only_rank_0
        self._inherit = inherit

    def outputs_of(self, rank: int) -> Outputs:
        """Returns the sinks of one rank, and creates its log file."""
        shown = [self._shown(rank, stream) for stream in (_STDOUT, _STDERR)]
        if self._logs is None:
            return Outputs(stdout=None if rank == 0 and self._inherit else shown[0], stderr=shown[1])
        log = LogFile(self._logs / f"rank_{rank}.log", self._say)
        return Outputs(stdout=Copies(shown[0], log), stderr=Copies(shown[1], log))

    def _shown(self, rank: int, stream: int) -> Sink:
        if rank == 0:
            return PassThrough(stream, self.while_blocked)
        return Nowhere() if self._only_rank_0 else Prefixed(stream, f"[rank {rank}] ", self.while_blocked)


def make_log_folder(parent: str, script: str) -> Path:
    """Creates and returns a new folder `SCRIPT-DATE-TIME` in `parent`, for the log files of one job.

    Raises:
        LaunchError: it cannot be created.
    """
    name = f"{Path(script).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1000):
        folder = Path(parent) / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not Path(parent).is_dir():
                raise LaunchError(f"--log-dir {parent}: this is a file; name a folder") from None
            continue
        except OSError as error:
            raise LaunchError(f"--log-dir {parent}: {error.strerror}") from None
        return folder
    raise LaunchError(f"--log-dir {parent}: it has a thousand folders {name}-*")
