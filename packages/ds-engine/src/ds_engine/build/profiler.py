"""ds-profiler for an engine: the FLOPs of one training step, as configured by `flops_profiler`."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ds_engine.config.sections.profiling import FlopsProfilerConfig
from ds_engine.files import write_whole
from ds_engine.interfaces import World
from ds_engine.training import timing

if TYPE_CHECKING:
    from ds_profiler import FlopsProfiler, Profile


class FlopsOfOneStep:
    """Profiles the step after `profile_step` steps, and writes the report when it has ended.

    Recording begins with the first forward of that step and pauses during the update, so loss functions of the user are
    seen, too, and the optimizer is not. Before and after that step nothing is attached to the model.
    """

    def __init__(
        self,
        model: nn.Module,
        section: FlopsProfilerConfig,
        *,
        ranks: int,
        batch: int,
        write: Callable[[str], None],
    ) -> None:
        self._model, self._section = model, section
        self._ranks, self._batch, self._write = ranks, batch, write
        self._ended = 0
        self._profiler: FlopsProfiler | None = None
        self._began_s = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around one part of a step (`ds_engine.training.timing.PARTS`)."""
        if name == timing.FORWARD and self._profiler is None and self._due() and self._model.training:
            from ds_profiler import FlopsProfiler

            self._profiler = FlopsProfiler(self._model)
            self._began_s = time.perf_counter()
            self._profiler.start()
        if name == timing.STEP and self._profiler is not None:
            self._profiler.stop()
        yield

    def end_step(self) -> None:
        """A step has ended: reports if it was profiled."""
        profiler, self._profiler = self._profiler, None
        step = self._ended
        self._ended += 1
        if profiler is not None:
            self._report(profiler.profile(), step, time.perf_counter() - self._began_s)

    def _due(self) -> bool:
        return self._ended == self._section.profile_step

    def _report(self, profile: Profile, step: int, step_s: float) -> None:
        from ds_profiler.flops.report import Job, text

        section = self._section
        path = None if section.output_file is None else Path(section.output_file)
        if path is not None and path.suffix == ".json":
            report = json.dumps(
                {"step": step, "step_s": step_s, "ranks": self._ranks, **profile.as_dict()}, indent=1
            )
        else:
            job = Job(
                step=step,
                ranks=self._ranks,
                batch=self._batch,
                step_s=step_s,
                recompute_factor=section.recompute_fwd_factor,
            )
            report = text(
                profile,
                depth=section.module_depth,
                top=section.top_modules,
                detailed=section.detailed,
                job=job,
            )
        if path is None:
            self._write(report)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, f"{report}\n".encode())


def flops_of(
    model: nn.Module, section: FlopsProfilerConfig, world: World, batch: int, write: Callable[[str], None]
) -> FlopsOfOneStep | None:
    """The profiler of rank 0 if the section is enabled; None otherwise. Ranks compute alike, so one profile says what
    each does, and the others wait for it in their collectives.
    """
    if not section.enabled or world.rank != 0:
        return None
    return FlopsOfOneStep(model, section, ranks=world.world_size, batch=batch, write=write)
