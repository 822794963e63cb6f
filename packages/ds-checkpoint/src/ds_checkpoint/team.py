"""The ranks that write or read a checkpoint together: they share bytes, and they fail together.

Bytes travel as uint8 tensors; torch's object collectives would pickle them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ds_checkpoint.errors import CheckpointError


class Team:
    """All ranks of the default process group, or this process alone where none stands."""

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
        dist.broadcast(count, src=0, group=self._group)
        content = self._tensor(payload, int(count)) if self.first else self._tensor(b"", int(count))
        dist.broadcast(content, src=0, group=self._group)
        return _bytes(content)

    def gather(self, payload: bytes) -> list[bytes]:
        """Every rank's `payload` in order on rank 0; empty elsewhere."""
        if self.size == 1:
            return [payload]
        lengths = self._lengths(len(payload))
        content = self._tensor(payload, max(lengths))
        parts = [torch.empty_like(content) for _ in lengths] if self.first else None
        dist.gather(content, parts, dst=0, group=self._group)
        return [_bytes(part[:n]) for part, n in zip(parts, lengths, strict=True)] if parts is not None else []

    def settle(self, error: Exception | None, doing: str) -> None:
        """Wait for all ranks; if any of them has an `error`, raise one that names all of those, on every
        rank.

        A rank that raised alone would leave the others waiting in their next collective.
        """
        text = "" if error is None else _describe(error)
        if self.size == 1:
            failed = {0: text} if text else {}
        else:
            encoded = text.encode()
            lengths = self._lengths(len(encoded))
            if not any(lengths):
                return
            parts = [torch.empty(max(lengths), dtype=torch.uint8, device=self.device) for _ in lengths]
            dist.all_gather(parts, self._tensor(encoded, max(lengths)), group=self._group)
            texts = [_bytes(part[:n]).decode() for part, n in zip(parts, lengths, strict=True)]
            failed = {rank: said for rank, said in enumerate(texts) if said}
        if failed:
            raise CheckpointError(_summary(failed, self.size, doing)) from error

    def _lengths(self, mine: int) -> list[int]:
        counts = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(
            counts, torch.tensor([mine], dtype=torch.int64, device=self.device), group=self._group
        )
        return [int(count) for count in counts]

    def _tensor(self, payload: bytes, length: int) -> Tensor:
        """`payload` followed by zeros, on the device that the backend can send from."""
        content = torch.frombuffer(bytearray(payload.ljust(max(length, 1), b"\0")), dtype=torch.uint8)
        return content[:length].to(self.device)


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
