"""The section `offload`."""

from __future__ import annotations

from pydantic import Field

from ds_engine.config.support.section import Section, Size

_UNITS = 'in bytes, or a string such as "40GB" (powers of 1000) or "40GiB" (powers of 1024)'


class BudgetConfig(Section):
    """Amounts of memory of one rank, within which the training state is placed so that the predicted step is the
    fastest.
    """

    device: Size | None = Field(
        default=None,
        description="Device memory for parameters, gradients, masters and optimizer states of a rank, "
        f"{_UNITS}. Activations and temporary buffers come on top. Default: no limit.",
    )
    activations: Size | None = Field(
        default=None,
        description=f"Device memory for the activations of one forward of a rank, {_UNITS}. The layers whose "
        'activations are moved to host memory (to the disk with activation_offload.device "nvme") are chosen so that '
        "the rest is within it. Default: no limit.",
    )
    host: Size | None = Field(
        default=None,
        description=f"Host memory of a rank for state and for buffers of what is on the disk, {_UNITS}. Default: no "
        "limit.",
    )
    disk: Size | None = Field(
        default=None,
        description=f"Disk space of a rank, {_UNITS}. Default: no limit if nvme_path is set, else no disk is used.",
    )
    nvme_path: str | None = Field(
        default=None, description="Directory on the disk. Default: none, and no disk is used."
    )


class RatesConfig(Section):
    """Bytes per second of one rank while all ranks of its machine work, with which steps are predicted. `ds plan
    --measure-offload` measures and prints them, `ds nvme tune --out` writes them.
    """

    device: Size = Field(default=2 * 10**12, description="Memory of the device, in bytes per second.")
    host: Size = Field(default=2 * 10**10, description="Memory of the host, in bytes per second.")
    link: Size = Field(
        default=2 * 10**10,
        description="Between device and host, in each direction, in bytes per second.",
    )
    disk_read: Size = Field(default=3 * 10**9, description="Reading from the disk, in bytes per second.")
    disk_write: Size = Field(default=2 * 10**9, description="Writing to the disk, in bytes per second.")


class OffloadConfig(Section):
    """Placement of the training state by a budget, instead of offload_optimizer and offload_param."""

    budget: BudgetConfig | None = Field(
        default=None,
        description="Places the training state within amounts of memory. Default: the state is where "
        "offload_optimizer and offload_param say.",
    )
    rates: RatesConfig = Field(
        default_factory=RatesConfig,
        description="Rates of memory, link and disk, for the placement by a budget.",
    )
