"""The sections `flops_profiler`, `comms_logger` and `timers`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import NotNegative, Positive, Section, Whole


class FlopsProfilerConfig(Section):
    """FLOPs, time and parameters of each module in one step."""

    enabled: bool = Field(default=False, description="Profiles one training step.")
    recompute_fwd_factor: NotNegative = Field(
        default=0.0, description="Fraction of forward that backward recomputes, between 0 and 1."
    )
    profile_step: Positive = Field(default=1, description="Training step that is profiled.")
    module_depth: Whole = Field(
        default=-1, description="Depth of the modules that are listed; -1 lists the innermost modules."
    )
    top_modules: Positive = Field(default=1, description="Number of modules that are listed at each depth.")
    detailed: bool = Field(default=True, description="Lists every module.")
    output_file: str | None = Field(
        default=None,
        description="File that the profile is written to. Default: the terminal.",
    )


class CommsLoggerConfig(Section):
    """Size, time and bandwidth of collectives."""

    enabled: bool = Field(default=False, description="Records collectives.")
    verbose: bool = Field(default=False, description="Prints each collective when it happens.")
    prof_all: bool = Field(default=True, description="Records all operations, not only those in prof_ops.")
    debug: bool = Field(default=False, description="Records the function that called each collective.")
    prof_ops: list[str] = Field(
        default_factory=list, description="Names of the operations that are recorded."
    )


class ThroughputTimerConfig(Section):
    """Samples per second."""

    enabled: bool = Field(default=True, description="Measures samples per second.")
    synchronized: bool = Field(default=True, description="Synchronises the device before time is taken.")


class TimersConfig(Section):
    """Timers of the engine."""

    throughput: ThroughputTimerConfig = Field(
        default_factory=ThroughputTimerConfig, description="Measurement of samples per second."
    )
