"""Jobs that save checkpoints without end, for test_checkpoint_kill.py: forked from one process, so that
torch is imported once.

Each line on standard input, "<how> <rendezvous file> <directory> <number>", starts a job of two ranks; answered
by "pids <pid> <pid>". `how` is "now" or "background". Rank 0 writes the number of every save that is complete:
that has returned, or, in the background, that the next one has waited for. The line "reap" waits until both ranks
are dead; answered by "reaped".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ds_checkpoint.write import Content, write
from ds_checkpoint.write.background import BackgroundSaver

RANKS = 2
NUMEL = 3000
"""Elements that one rank has of each tensor."""


class Record:
    """A rank's half of one logical tensor, which holds the number of the save in every element."""

    state = "param"
    coordinates: Mapping[str, tuple[int, int]] = {}

    def __init__(self, fqn: str, rank: int, ranks: int) -> None:
        self.fqn = fqn
        self.global_shape = (ranks * NUMEL,)
        self.flat_offset = rank * NUMEL
        self.data = torch.zeros(NUMEL, dtype=torch.int64)


def say(text: str) -> None:
    """In one write, so that lines of several processes do not mix."""
    os.write(1, f"{text}\n".encode())


def save_forever(rank: int, how: str, rendezvous: str, root: Path, number: int) -> None:
    """Save under new tags, over an old one, and with pruning, by turns; the tensors change after each call, as in
    training."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    saver = BackgroundSaver(lambda text: None) if how == "background" else None
    records = [Record(name, rank, RANKS) for name in "abcd"]
    while True:
        number += 1
        for record in records:
            record.data.fill_(number)
        content = Content(records=records, values={"number": number} if rank == 0 else {})
        # Most saves replace the very checkpoint that `latest` names: there a save that is not atomic does
        # harm.
        tag = f"step{number}" if number % 3 == 0 else "same"
        if saver is None:
            write(root, tag, lambda: content, keep_last=3)  # noqa: B023 - called at once
        else:
            saver.save(root, tag, lambda: content, keep_last=3)  # noqa: B023 - called at once
        if rank == 0:
            say(str(number if saver is None else number - 1))


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        if line.strip() == "reap":
            for _ in range(RANKS):
                os.wait()
            say("reaped")
            continue
        how, rendezvous, root, number = line.split()
        pids = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a survivor complains about the dead
                try:
                    save_forever(rank, how, rendezvous, Path(root), int(number))
                finally:
                    os._exit(1)
            pids.append(pid)
        say(f"pids {' '.join(map(str, pids))}")


if __name__ == "__main__":
    main()
