"""The result of a plan, as values, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from ds_zero.tensors.sizes import human_bytes


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """Memory of one rank at the peak of a phase, in bytes."""

    phase: str
    """"load", "forward", "backward", "step" or "save"; "rest" is between steps."""
    device_bytes: int
    """Bytes on the training device; on a CPU all bytes, including "offloaded" ones."""
    host_bytes: int
    """Bytes in host memory on a machine with an accelerator; on a CPU, the part of `device_bytes` in an offload
    store.
    """
    parts: Mapping[str, int]
    """Purpose -> bytes at the peak."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of one bucket that a rank keeps between steps, and that a store may place."""

    name: str
    """Name of the bucket."""
    kind: str
    """"param", "master", "grad", or "state" for all optimizer states of the bucket together."""
    num_bytes: int
    compute_bytes: int
    """Bytes of as many elements in the compute dtype of the bucket."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Changed settings with which the job fits into the budget."""

    changes: Mapping[str, object]
    """Argument of `plan` -> new value."""
    text: str
    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predicted memory and messages of one rank. `print` it, or use `to_json`."""

    model: str
    params_numel: int
    trainable_numel: int
    stage: int
    ranks: int
    compute_dtype: str
    optimizer: str
    accumulation_steps: int
    accumulation_plan: str
    checkpointing: bool
    offload: tuple[str, ...]
    """Kinds of shards that are kept on the host."""
    disk: tuple[str, ...] = ()
    """Kinds of shards that are kept on a disk."""
    disk_bytes: int = 0
    """Bytes of one rank on a disk."""
    moved_bytes: int = 0
    """Bytes of activations that leave the device in the forward of one micro-batch, and return in its backward."""
    device: str
    phases: tuple[PhaseMemory, ...]
    sent_bytes: Mapping[str, int]
    """Bytes sent by one rank in one optimizer step, by phase; empty without a micro-batch."""
    reserve_bytes: int
    """Part of every phase's `device_bytes`: an allowance for memory that kernels allocate while they run."""
    notes: tuple[str, ...] = ()
    budget_bytes: int | None = None
    host_budget_bytes: int | None = None
    remedies: tuple[Remedy, ...] = ()
    """If the job does not fit: the nearest settings that do, possibly none."""
    tensors: tuple[StoredTensor, ...] = field(default=(), repr=False)
    """What rank 0 keeps between steps, apart from whole parameters and buffers. Not in `to_json`."""

    @property
    def device_bytes(self) -> int:
        """The peak on the device."""
        return max(p.device_bytes for p in self.phases)

    @property
    def host_bytes(self) -> int:
        """The peak in host memory; on a CPU, the peak of an offload store."""
        return max(p.host_bytes for p in self.phases)

    @property
    def fits(self) -> bool | None:
        """Whether the peaks are within the budgets; None without a budget."""
        if self.budget_bytes is None and self.host_budget_bytes is None:
            return None
        return within(self.device_bytes, self.budget_bytes) and within(
            self.host_bytes, self.host_budget_bytes
        )

    def phase(self, name: str) -> PhaseMemory:
        """Returns a phase by name."""
        return next(p for p in self.phases if p.phase == name)

    def to_json(self) -> str:
        """Returns all fields, and `device_bytes`, `host_bytes`, `fits`."""
        whole = asdict(replace(self, tensors=())) | {
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "fits": self.fits,
        }
        del whole["tensors"]
        return json.dumps(whole, indent=2)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows of the table: a row for each purpose, a column for each phase."""
        purposes = [n for n in self.phases[0].parts if any(p.parts.get(n) for p in self.phases)]
        header = ["bytes per rank", *(p.phase for p in self.phases)]
        table = [[name, *(_cell(p.parts.get(name, 0)) for p in self.phases)] for name in purposes]
        table.append(["reserve", *(_cell(self.reserve_bytes) for _ in self.phases)])
        place = "in all" if self.device == "cpu" else f"on {self.device}"
        table.append([place, *(human_bytes(p.device_bytes) for p in self.phases)])
        if self.offload or self.disk or self.moved_bytes:
            table.append(["on the host", *(human_bytes(p.host_bytes) for p in self.phases)])
        if self.sent_bytes:
            table.append(["sent a step", *(_cell(self.sent_bytes.get(p.phase, 0)) for p in self.phases)])
        return header, table

    def title(self) -> str:
        """Returns a line that names the planned job."""
        parts = [
            f"{self.model}: {self.params_numel:,} parameters",
            f"stage {self.stage}",
            f"{self.ranks} rank{'s' if self.ranks > 1 else ''} ({self.device})",
            self.compute_dtype.removeprefix("torch."),
            self.optimizer + self._place(),
        ]
        if self.accumulation_steps > 1:
            parts.append(f"{self.accumulation_steps} micro-batches, {self.accumulation_plan} plan")
        if self.checkpointing:
            parts.append("activations recomputed")
        return ", ".join(parts)

    def _place(self) -> str:
        if self.disk:
            return f" on the host, {' and '.join(self.disk)} on a disk"
        return " on the host" if self.offload else ""

    def verdict(self) -> list[str]:
        """Returns the lines below the table: the peak, whether it fits, remedies, and notes."""
        lines = [f"peak {human_bytes(self.device_bytes)} a rank"]
        if (self.offload or self.disk or self.moved_bytes) and self.device != "cpu":
            lines[0] += f", and {human_bytes(self.host_bytes)} of host memory"
        if self.disk_bytes:
            lines[0] += f", and {human_bytes(self.disk_bytes)} on a disk"
        if self.fits is not None:
            lines[0] += f": {'fits' if self.fits else 'does not fit'} in {self._budgets()}"
        if self.moved_bytes:
            moved = human_bytes(self.moved_bytes)
            lines.append(
                f"{moved} of activations leave the device in each forward and return in its backward"
            )
        if self.fits is False:
            lines += ["nearest settings that fit:"] if self.remedies else ["no settings were found that fit"]
            for remedy in self.remedies:
                host = f", host {human_bytes(remedy.host_bytes)}" if remedy.host_bytes else ""
                lines.append(f"  {remedy.text}: {human_bytes(remedy.device_bytes)}{host}")
        return lines + [f"note: {note}" for note in self.notes]

    def _budgets(self) -> str:
        budgets = [human_bytes(self.budget_bytes)] if self.budget_bytes is not None else []
        if self.host_budget_bytes is not None:
            budgets.append(f"{human_bytes(self.host_budget_bytes)} of host memory")
        return " and ".join(budgets)

    def __str__(self) -> str:
        header, rows = self.rows()
        return "\n".join([self.title(), *text_table(header, rows), *self.verdict()])


def within(num_bytes: int, budget_bytes: int | None) -> bool:
    """Whether a peak is within a budget, if there is one."""
    return budget_bytes is None or num_bytes <= budget_bytes


def _cell(num_bytes: int) -> str:
    return human_bytes(num_bytes) if num_bytes else "-"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines with aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells)

    return [line(header), "  ".join("-" * w for w in widths), *map(line, rows)]
