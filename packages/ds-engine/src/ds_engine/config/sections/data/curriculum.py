"""The sections for curriculum learning: `curriculum_learning`, and the one inside `data_efficiency`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ds_engine.config.support.section import Number, Positive, Section

Schedule = Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"]


class CurriculumScheduleConfig(Section):
    """How the difficulty grows."""

    total_curriculum_step: Positive | None = Field(
        default=None, description="Step at which it is full; fixed_linear and fixed_root."
    )
    difficulty_step: Positive | None = Field(
        default=None, description="Difficulties are multiples of this; fixed_linear and fixed_root."
    )
    root_degree: Positive | None = Field(default=None, description="Degree of the root; fixed_root.")
    difficulty: list[Number] | None = Field(default=None, description="Difficulties; fixed_discrete.")
    max_step: list[Positive] | None = Field(
        default=None, description="Last step of each difficulty but the last; fixed_discrete."
    )


class LegacyCurriculumConfig(Section):
    """Short sequences first; the engine passes the length to forward as `curriculum_seqlen`."""

    enabled: bool = Field(default=False, description="Grow the difficulty.")
    curriculum_type: Literal["seqlen"] = Field(default="seqlen", description="What grows.")
    min_difficulty: Positive | None = Field(default=None, description="At the beginning.")
    max_difficulty: Positive | None = Field(default=None, description="At the end.")
    schedule_type: Schedule = Field(default="fixed_linear", description="How it grows.")
    schedule_config: CurriculumScheduleConfig = Field(
        default_factory=CurriculumScheduleConfig, description="Numbers of the schedule."
    )


class CurriculumMetricConfig(Section):
    """One measure of difficulty."""

    index_to_sample_path: str | None = Field(
        default=None,
        description="Folder that ds_engine.sampling.Analyzer has written for this measure; or DeepSpeed's file.",
    )
    index_to_metric_path: str | None = Field(
        default=None,
        description="The second of DeepSpeed's files; not needed for a folder of ours, nor for percentiles.",
    )
    difficulty_type: Literal["value", "percentile"] = Field(
        default="value", description="What the bounds are given in."
    )
    clustering_type: Literal["single_cluster", "schedule_based"] = Field(
        default="schedule_based",
        description="schedule_based: draw from samples that are easy enough; single_cluster: from all, and only tell "
        "the difficulty.",
    )
    min_difficulty: Number | None = Field(default=None, description="At the beginning.")
    max_difficulty: Number | None = Field(default=None, description="At the end.")
    schedule_type: Schedule = Field(default="fixed_linear", description="How it grows.")
    schedule_config: CurriculumScheduleConfig = Field(
        default_factory=CurriculumScheduleConfig, description="Numbers of the schedule."
    )


class CurriculumConfig(Section):
    """Easy samples first, by any measures of difficulty."""

    enabled: bool = Field(default=False, description="Grow the difficulty.")
    data_cluster_path: str | None = Field(default=None, description="Directory for lists of samples.")
    curriculum_metrics: dict[str, CurriculumMetricConfig] = Field(
        default_factory=dict, description="Name to measure of difficulty."
    )
