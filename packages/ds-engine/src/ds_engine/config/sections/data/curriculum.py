"""The sections for curriculum learning: `curriculum_learning`, and the one inside `data_efficiency`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Number, Positive, Section

Schedule = Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"]


class CurriculumScheduleConfig(Section):
    """Numbers of the schedule by which the difficulty grows."""

    total_curriculum_step: Positive | None = Field(
        default=None,
        description="Training step at which the maximum difficulty is reached. Required by "
        "fixed_linear and fixed_root. Default: none.",
    )
    difficulty_step: Positive | None = Field(
        default=None,
        description="Difficulties are rounded down to multiples of this number. Required by "
        "fixed_linear and fixed_root. Default: none.",
    )
    root_degree: Positive | None = Field(
        default=None,
        description="Degree of the root by which the difficulty grows. Required by fixed_root. Default: none.",
    )
    difficulty: list[Number] | None = Field(
        default=None,
        description="List of difficulties. Required by fixed_discrete. Default: none.",
    )
    max_step: list[Positive] | None = Field(
        default=None,
        description="Last training step of each difficulty except the last. Required by fixed_discrete. "
        "Default: none.",
    )


class LegacyCurriculumConfig(Section):
    """A curriculum of sequence lengths: the engine passes the current length to forward as `curriculum_seqlen`."""

    enabled: bool = Field(default=False, description="Passes a growing sequence length to forward.")
    curriculum_type: Literal["seqlen"] = Field(default="seqlen", description="Quantity that grows.")
    min_difficulty: Positive | None = Field(
        default=None,
        description="Sequence length at the first step, in tokens. Required. Default: none.",
    )
    max_difficulty: Positive | None = Field(
        default=None,
        description="Sequence length at the end of the schedule, in tokens. Required. Default: none.",
    )
    schedule_type: Schedule = Field(
        default="fixed_linear", description="Function by which the difficulty grows."
    )
    schedule_config: CurriculumScheduleConfig = Field(
        default_factory=CurriculumScheduleConfig, description="Numbers of the schedule."
    )


class CurriculumMetricConfig(Section):
    """One measure of difficulty."""

    index_to_sample_path: str | None = Field(
        default=None,
        description="Directory that ds_engine.sampling.Analyzer wrote for this measure, or DeepSpeed's file "
        'of samples by difficulty. Required by clustering_type "schedule_based". Default: none.',
    )
    index_to_metric_path: str | None = Field(
        default=None,
        description="DeepSpeed's file of difficulties. A directory of the Analyzer and percentiles do not "
        "need it. Default: none.",
    )
    difficulty_type: Literal["value", "percentile"] = Field(
        default="value",
        description="Whether min_difficulty and max_difficulty are values of the measure or percentiles of "
        "the samples.",
    )
    clustering_type: Literal["single_cluster", "schedule_based"] = Field(
        default="schedule_based",
        description='"schedule_based" draws samples up to the current difficulty only; "single_cluster" draws '
        "from all samples and only reports the difficulty.",
    )
    min_difficulty: Number | None = Field(
        default=None, description="Difficulty at the first step. Required. Default: none."
    )
    max_difficulty: Number | None = Field(
        default=None,
        description="Difficulty at the end of the schedule. Required. Default: none.",
    )
    schedule_type: Schedule = Field(
        default="fixed_linear", description="Function by which the difficulty grows."
    )
    schedule_config: CurriculumScheduleConfig = Field(
        default_factory=CurriculumScheduleConfig, description="Numbers of the schedule."
    )


class CurriculumConfig(Section):
    """A curriculum: samples are drawn up to a difficulty that grows during training."""

    enabled: bool = Field(default=False, description="Draws samples by their difficulty.")
    data_cluster_path: str | None = Field(
        default=None, description="Directory in which DeepSpeed stores lists of samples. Default: none."
    )
    curriculum_metrics: dict[str, CurriculumMetricConfig] = Field(
        default_factory=dict, description="Measures of difficulty under names of your choice."
    )
