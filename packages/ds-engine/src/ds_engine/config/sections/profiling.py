"""The sections `flops_profiler`, `comms_logger` and `timers`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import NotNegative, Positive, Section, Whole


class FlopsProfilerConfig(Section):
    """Parameters, FLOPs and time of each module in one training step, reported by rank 0."""

    enabled: bool = Field(default=False, description="Profiles one training step.")
    recompute_fwd_factor: NotNegative = Field(
        default=0.0,
        description="Fraction of forward that backward recomputes, for recomputation that cannot be seen. What is seen "
        "is counted instead.",
    )
    profile_step: Positive = Field(
        default=1, description="Training steps of this process before the one that is profiled."
    )
    module_depth: Whole = Field(
        default=-1,
        description="Depth of which the largest modules are listed; -1 lists them for every depth.",
    )
    top_modules: Positive = Field(
        default=1, description="How many classes of modules are listed for a depth."
    )
    detailed: bool = Field(default=True, description="Adds the tree of all modules.")
    output_file: str | None = Field(
        default=None,
        description="File that the report is written to; if its name ends in .json, as JSON. Default: the terminal.",
    )


class CommsLoggerConfig(Section):
    """Number, size, time and bandwidth of collectives, and the ranks that others wait for. Nothing is synchronised for
    the times. `engine.roles.comms_log` has the records, and `log_summary` prints them.
    """

    enabled: bool = Field(
        default=False,
        description="Records the collectives of training and all calls of torch.distributed's functions.",
    )
    verbose: bool = Field(
        default=False, description="Rank 0 writes a line for each collective when it has ended."
    )
    prof_all: bool = Field(default=True, description="Records all operations, not only those in prof_ops.")
    debug: bool = Field(
        default=False,
        description="Records the function that called each collective: one line for each in the table.",
    )
    prof_ops: list[str] = Field(
        default_factory=list,
        description="Names of the operations that are recorded if prof_all is false, such as all_reduce.",
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
