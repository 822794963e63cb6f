"""The sections `flops_profiler`, `comms_logger` and `timers`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import NotNegative, Positive, Section, Whole


class FlopsProfilerConfig(Section):
    """FLOPs, time and parameters of each module at one step."""

    enabled: bool = Field(default=False, description="Profile.")
    recompute_fwd_factor: NotNegative = Field(
        default=0.0, description="Part of forward that backward computes again."
    )
    profile_step: Positive = Field(default=1, description="The step that is profiled.")
    module_depth: Whole = Field(default=-1, description="Depth of modules that are shown; -1: the innermost.")
    top_modules: Positive = Field(default=1, description="Modules that are shown at each depth.")
    detailed: bool = Field(default=True, description="Show every module.")
    output_file: str | None = Field(default=None, description="Where to write. Default: to the terminal.")


class CommsLoggerConfig(Section):
    """Size, time and bandwidth of collectives."""

    enabled: bool = Field(default=False, description="Record.")
    verbose: bool = Field(default=False, description="Print each one.")
    prof_all: bool = Field(default=True, description="Record all operations, not only prof_ops.")
    debug: bool = Field(default=False, description="Name the caller.")
    prof_ops: list[str] = Field(default_factory=list, description="Operations to record.")


class ThroughputTimerConfig(Section):
    """Samples per second."""

    enabled: bool = Field(default=True, description="Measure.")
    synchronized: bool = Field(default=True, description="Wait for the accelerator before the time is taken.")


class TimersConfig(Section):
    """Timers."""

    throughput: ThroughputTimerConfig = Field(
        default_factory=ThroughputTimerConfig, description="Samples per second."
    )
