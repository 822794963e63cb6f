"""The sections `tensorboard`, `csv_monitor`, `wandb` and `comet`: where loss, rate and scale are recorded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_engine.config.support.section import Positive, Section, lowered

_ENABLED = "Records curves of loss, learning rate, loss scale and gradient norm on rank 0."


def _one_directory(name: object) -> object:
    if isinstance(name, str) and (not name.strip() or name in (".", "..") or any(c in name for c in "/\\\0")):
        raise ValueError("it has to be the name of one directory, without / and other than ..")
    return name


DirectoryName = Annotated[str, BeforeValidator(_one_directory)]
"""The name of a directory, not a path: what is written stays below the output path."""


class TensorBoardConfig(Section):
    """Curves as event files for TensorBoard."""

    enabled: bool = Field(default=False, description=_ENABLED)
    output_path: str = Field(
        default="",
        description='Directory of all jobs. An empty text stands for "runs" in the working directory.',
    )
    job_name: DirectoryName = Field(
        default="DeepSpeedJobName", description="Name of the directory of this job inside output_path."
    )


class CsvConfig(Section):
    """Curves as CSV files, one for each quantity."""

    enabled: bool = Field(default=False, description=_ENABLED)
    output_path: str = Field(
        default="",
        description='Directory of all jobs. An empty text stands for "csv_monitor" in the working directory.',
    )
    job_name: DirectoryName = Field(
        default="DeepSpeedJobName", description="Name of the directory of this job inside output_path."
    )


class WandbConfig(Section):
    """Curves at Weights & Biases."""

    enabled: bool = Field(default=False, description=_ENABLED)
    group: str | None = Field(default=None, description="Group of runs. Default: none.")
    team: str | None = Field(default=None, description="Team that owns the run. Default: the user's own.")
    project: str = Field(default="deepspeed", description="Project of the run.")


class CometConfig(Section):
    """Curves at Comet. Settings that are left out come from Comet's own file and environment variables."""

    enabled: bool = Field(default=False, description=_ENABLED)
    samples_log_interval: Positive = Field(
        default=100, description="Number of training samples between two records."
    )
    project: str | None = Field(
        default=None, description="Project of the experiment. Default: Comet's settings."
    )
    workspace: str | None = Field(
        default=None, description="Workspace of the project. Default: Comet's settings."
    )
    api_key: str | None = Field(
        default=None, description="Key of the Comet account. Default: Comet's settings."
    )
    experiment_name: str | None = Field(
        default=None, description="Name of the experiment. Default: Comet makes one up."
    )
    experiment_key: str | None = Field(
        default=None,
        description="Identifier of the experiment, 32 to 50 characters. Default: Comet makes one up.",
    )
    online: bool | None = Field(
        default=None,
        description="Sends curves to Comet; false writes them to local files. Default: Comet's settings.",
    )
    mode: Annotated[Literal["get", "create", "get_or_create"] | None, BeforeValidator(lowered)] = Field(
        default=None,
        description='Whether to continue an experiment ("get"), to start one ("create"), or either. Default: '
        "Comet's settings.",
    )
