"""Shows the output of ranks in `sys.stdout` and `sys.stderr`, which a notebook replaces by the output of a cell."""

from __future__ import annotations

import codecs
import sys

from ds_engine.launch.output import Outputs


class _Stream:
    """One stream of a rank. Only complete lines appear, and states of progress bars of rank 0, so that lines of several
    ranks are not mixed; those of other ranks have a prefix.
    """

    def __init__(self, name: str, rank: int) -> None:
        self._name = name
        self._prefix = f"[rank {rank}] " if rank else ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._partial = ""

    def feed(self, data: bytes) -> None:
        """Writes the lines that `data` completes."""
        text = self._partial + self._decoder.decode(data)
        end = max(text.rfind("\n"), -1 if self._prefix else text.rfind("\r")) + 1
        self._partial = text[end:]
        self._write(text[:end])

    def close(self) -> None:
        """Writes the remaining incomplete line."""
        rest = self._partial + self._decoder.decode(b"", final=True)
        if rest:
            self._write(f"{rest}\n")

    def _write(self, text: str) -> None:
        lines = text.splitlines(keepends=True) if self._prefix else [text]
        stream = getattr(sys, self._name)
        stream.write("".join(f"{self._prefix}{line}" for line in lines))
        stream.flush()


def outputs_of(rank: int) -> Outputs:
    """Returns the sinks of one rank."""
    return Outputs(stdout=_Stream("stdout", rank), stderr=_Stream("stderr", rank))
