"""The sections `tensorboard`, `csv_monitor`, `wandb` and `comet`: where loss, rate and scale are recorded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ds_engine.config.support.section import Positive, Section, lowered

_ENABLED = "Record on rank 0."


def _one_directory(name: object) -> object:
    if isinstance(name, str) and (not name.strip() or name in (".", "..") or any(c in name for c in "/\\\0")):
        raise ValueError("it has to be the name of one directory, without / and other than ..")
    return name


DirectoryName = Annotated[str, BeforeValidator(_one_directory)]
"""The name of a directory, not a path: what is written stays below the output path."""


class TensorBoardConfig(Section):
    """Event files for TensorBoard."""

    enabled: bool = Field(default=False, description=_ENABLED)
    output_path: str = Field(default="", description="Directory. Default: runs, in the working directory.")
    job_name: DirectoryName = Field(default="DeepSpeedJobName", description="Directory inside output_path.")


class CsvConfig(Section):
    """One CSV file for each value."""

    enabled: bool = Field(default=False, description=_ENABLED)
    output_path: str = Field(
        default="", description="Directory. Default: csv_monitor, in the working directory."
    )
    job_name: DirectoryName = Field(default="DeepSpeedJobName", description="Directory inside output_path.")


class WandbConfig(Section):
    """Weights & Biases."""

    enabled: bool = Field(default=False, description=_ENABLED)
    group: str | None = Field(default=None, description="Group of runs.")
    team: str | None = Field(default=None, description="Team.")
    project: str = Field(default="deepspeed", description="Project.")


class CometConfig(Section):
    """Comet; what is left out comes from its own settings file and variables."""

    enabled: bool = Field(default=False, description=_ENABLED)
    samples_log_interval: Positive = Field(default=100, description="Samples between two records.")
    project: str | None = Field(default=None, description="Project.")
    workspace: str | None = Field(default=None, description="Workspace.")
    api_key: str | None = Field(default=None, description="Key for the service.")
    experiment_name: str | None = Field(default=None, description="Name of the experiment.")
    experiment_key: str | None = Field(
        default=None, description="Key of the experiment, 32 to 50 characters."
    )
    online: bool | None = Field(default=None, description="False: record locally.")
    mode: Annotated[Literal["get", "create", "get_or_create"] | None, BeforeValidator(lowered)] = Field(
        default=None, description="Continue an experiment, begin one, or either."
    )
