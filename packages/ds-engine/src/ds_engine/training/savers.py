"""What saves the state of an engine besides `save_checkpoint` itself: a background writer, and copies in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ds_engine.interfaces import BackgroundWriter

if TYPE_CHECKING:
    from ds_engine.checkpoint import MemoryCopies


@dataclass(kw_only=True)
class Savers:
    """The savers of one engine."""

    background: BackgroundWriter | None = None
    """Writes checkpoints in the background; None: `save_checkpoint` writes synchronously."""
    copies: MemoryCopies | None = None
    """Keeps the newest state in the memory of hosts; None: nothing does."""
    interval: int | None = None
    """Number of steps from one copy in memory to the next; None: only `save_copy` makes them."""
    has_room: bool = False
    """Whether it was checked that the hosts have memory for the copies."""

    def wait(self) -> None:
        """Returns when no checkpoint is being written in the background."""
        if self.background is not None:
            self.background.wait()

    def hold(self) -> None:
        """Returns when all state is copied that will be written in the background."""
        if self.background is not None:
            self.background.hold()

    def close(self) -> None:
        """Waits, and frees buffers and process groups. Copies stay in memory, for the next start."""
        if self.background is not None:
            self.background.close()
        if self.copies is not None:
            self.copies.close()

    def is_due(self, step: int) -> bool:
        """Whether a copy is to be made after this step."""
        return self.copies is not None and self.interval is not None and step % self.interval == 0
