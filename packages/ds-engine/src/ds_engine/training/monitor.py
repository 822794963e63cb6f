"""Writes curves to CSV files, TensorBoard, Weights & Biases and Comet."""

from __future__ import annotations

import contextlib
import csv
import importlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ds_engine.config.support.errors import ConfigError

if TYPE_CHECKING:
    from ds_engine.config.sections.model import DsConfig
    from ds_engine.training.progress import StepReport

Event = tuple[str, float, int]
"""Name, value, and position on the x axis. For curves of the engine, x is the number of processed samples."""

LOSS = "Train/Samples/train_loss"
LR = "Train/Samples/lr"
LOSS_SCALE = "Train/Samples/loss_scale"
GRAD_NORM = "Train/Samples/grad_norm"
TIME = "Train/Samples/elapsed_time_ms_"
SPEED = "Train/Samples/samples_per_s"
MEMORY = "Train/Samples/memory_bytes"


class Writer(Protocol):
    """A destination of curves."""

    def write(self, events: Sequence[Event]) -> None: ...

    def close(self) -> None: ...


class CsvWriter:
    """Writes one file for each name, `<folder>/<name with _ for />.csv`, with a header and a line for each value."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def write(self, events: Sequence[Event]) -> None:
        for name, value, at in events:
            plain = name.replace("/", "_")
            path = self.folder / f"{plain}.csv"
            size = path.stat().st_size if path.exists() else 0
            try:
                # Opened for each line, so that nothing is lost if the job is killed, and other processes can read the
                # file.
                with path.open("a", newline="") as file:
                    writer = csv.writer(file)
                    if size == 0:
                        writer.writerow(["step", plain])
                    writer.writerow([at, value])
            except OSError:
                # If the disk is full, a part of the line may have been written.
                with contextlib.suppress(OSError):
                    os.truncate(path, size)
                raise

    def close(self) -> None:
        """Does nothing: no file is open."""


def csv_folder(config: DsConfig) -> Path:
    """The folder of this job's CSV files."""
    section = config.csv_monitor
    return Path(section.output_path or "csv_monitor") / section.job_name


class TensorBoardWriter:
    """Writes event files to `folder`."""

    def __init__(self, folder: Path) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(folder))

    def write(self, events: Sequence[Event]) -> None:
        for name, value, at in events:
            self._writer.add_scalar(name, value, at)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Writes to a run of Weights & Biases."""

    def __init__(self, *, project: str, group: str | None, team: str | None) -> None:
        self._module = _import("wandb", "wandb", "wandb")
        self._run = self._module.init(project=project, group=group, entity=team)

    def write(self, events: Sequence[Event]) -> None:
        # One call for each x: a later one with a smaller x would be dropped.
        for at in sorted({at for _, _, at in events}):
            self._run.log({name: value for name, value, x in events if x == at}, step=at)

    def close(self) -> None:
        self._run.finish()


class CometWriter:
    """Writes to an experiment of Comet."""

    def __init__(self, *, every: int, options: dict[str, Any]) -> None:
        module = _import("comet_ml", "comet", "comet_ml")
        name = options.pop("experiment_name", None)
        self._experiment = module.start(**{k: v for k, v in options.items() if v is not None})
        if name is not None:
            self._experiment.set_name(name)
        self._every, self._last = every, -math.inf

    def write(self, events: Sequence[Event]) -> None:
        newest = max(at for _, _, at in events)
        if newest - self._last < self._every:
            return
        self._last = newest
        for name, value, at in events:
            self._experiment.log_metric(name, value, step=at)

    def close(self) -> None:
        self._experiment.end()


def _import(module: str, section: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        said = f"{section}.enabled is true, but the package {package} is not installed"
        raise ConfigError([f"{said}: pip install {package}, or set it to false"]) from error


class Monitor:
    """Passes events to every writer. Only rank 0 has writers; without writers nothing is computed."""

    def __init__(
        self, writers: Iterable[Writer] = (), *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.writers = list(writers)
        self._clock = clock
        self._last: tuple[float, StepReport] | None = None
        """When the last step ended, and that step."""
        self._failed: set[int] = set()

    @classmethod
    def of(cls, config: DsConfig, rank: int) -> Monitor:
        """Makes the configured writers.

        Raises:
            ConfigError: a writer needs a package that is not installed.
        """
        if rank != 0:
            return cls()
        writers: list[Writer] = []
        if config.csv_monitor.enabled:
            writers.append(CsvWriter(csv_folder(config)))
        if config.tensorboard.enabled:
            board = config.tensorboard
            writers.append(TensorBoardWriter(Path(board.output_path or "runs") / board.job_name))
        if config.wandb.enabled:
            wandb = config.wandb
            writers.append(WandbWriter(project=wandb.project, group=wandb.group, team=wandb.team))
        if config.comet.enabled:
            options = config.comet.model_dump(exclude={"enabled", "samples_log_interval"})
            writers.append(CometWriter(every=config.comet.samples_log_interval, options=options))
        return cls(writers)

    @property
    def enabled(self) -> bool:
        """Whether anything is written."""
        return bool(self.writers)

    def write_events(self, events: Sequence[Event]) -> None:
        """Writes values of your own."""
        if events:
            for writer in self.writers:
                with self._lenient(writer):
                    writer.write(events)

    def step(
        self,
        report: StepReport,
        loss: float | None,
        times_ms: dict[str, float],
        *,
        memory_bytes: int | None = None,
    ) -> None:
        """Writes the curves of the engine after a step.

        Args:
            loss: mean over this rank's micro-batches; None: unknown.
            times_ms: milliseconds of each measured part.
            memory_bytes: memory that this rank holds; None: unknown.
        """
        if not self.enabled:
            return
        values: dict[str, float | None] = {
            LOSS: loss,
            LR: report.lr,
            GRAD_NORM: report.grad_norm,
            LOSS_SCALE: report.loss_scale,
        }
        values |= {SPEED: self._speed(report), MEMORY: memory_bytes}
        values |= {TIME + name: value for name, value in times_ms.items()}
        self.write_events(
            [(name, value, report.samples) for name, value in values.items() if value is not None]
        )

    def _speed(self, report: StepReport) -> float | None:
        """Samples per second since the end of the step before; None if that step was not seen by this process."""
        now, before = self._clock(), self._last
        self._last = (now, report)
        if before is None or before[1].step + 1 != report.step:
            return None
        return (report.samples - before[1].samples) / max(now - before[0], 1e-9)

    def close(self) -> None:
        """Ends runs and closes files. Safe to call twice."""
        writers, self.writers = self.writers, []
        for writer in writers:
            with self._lenient(writer):
                writer.close()

    @contextlib.contextmanager
    def _lenient(self, writer: Writer) -> Iterator[None]:
        """Runs a writer without stopping the training on errors, such as a full disk or an unreachable service. The
        first failure of each writer warns.
        """
        try:
            yield
        except OSError as error:
            if id(writer) not in self._failed:
                self._failed.add(id(writer))
                warnings.warn(
                    f"{type(writer).__name__} cannot write curves: {error}. Training continues, and every later "
                    "step tries again; the values of failed steps are lost. Fix the cause, or disable this "
                    "monitor in the configuration",
                    stacklevel=4,
                )
