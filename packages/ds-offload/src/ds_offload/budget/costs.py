"""Bytes and seconds of one bucket, for each place where its tensors can be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from ds_offload.budget.inputs import BucketBytes, Choice, Rates, Seconds, Work
from ds_offload.interfaces import Tier


@dataclass(frozen=True, kw_only=True)
class Option:
    """One place of a bucket, and what it costs."""

    choice: Choice
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    seconds: Seconds

    def vector(self) -> tuple[float, ...]:
        """Returns bytes of device, host, disk; then the seconds, in the order of `Seconds`."""
        s = self.seconds
        return (
            self.device_bytes,
            self.host_bytes,
            self.disk_bytes,
            s.load_link,
            s.load_disk,
            s.host,
            s.link,
            s.disk,
            s.device,
        )


def options(bucket: BucketBytes, rates: Rates, work: Work, disk: Collection[str]) -> Sequence[Option]:
    """Returns the places of a bucket, with no other kinds on the disk than `disk`.

    Masters, gradients and states are together on the device, or none of them is. States are in host memory only if the
    masters are, because a page is stepped beside its parameters. Where masters may be on the disk, states are with
    them: masters cost as much per byte, and pages of single buckets need less memory than those of all.
    """

    def away(kind: str) -> tuple[Tier, ...]:
        return ("host", "disk") if kind in disk else ("host",)

    stepped = [kind for kind in ("master", "grad", "state") if kind in bucket.kinds]
    places: list[dict[str, Tier]] = [dict.fromkeys(stepped, "device")]
    if "master" in bucket.kinds:
        for tiers in product(*map(away, stepped)):
            place = dict(zip(stepped, tiers, strict=True))
            if "master" in disk and place["master"] != place.get("state", place["master"]):
                continue
            places.append(place)
    params: Sequence[dict[str, Tier]] = [{}]
    if "param" in bucket.kinds:
        params = [{"param": tier} for tier in ("device", *away("param"))]
    return [_option(bucket, {**place, **param}, rates, work) for place in places for param in params]


def _option(bucket: BucketBytes, tiers: dict[str, Tier], rates: Rates, work: Work) -> Option:
    sizes = dict.fromkeys(("device", "host", "disk"), 0)
    for kind, tier in tiers.items():
        sizes[tier] += bucket.kinds[kind]
    for tier, size in undo_bytes(bucket, tiers, work).items():
        sizes[tier] += size
    return Option(
        choice=Choice(tiers=tiers),
        device_bytes=sizes["device"],
        host_bytes=sizes["host"],
        disk_bytes=sizes["disk"],
        seconds=_seconds(bucket, tiers, rates, work),
    )


def undo_bytes(bucket: BucketBytes, tiers: Mapping[str, Tier], work: Work) -> dict[Tier, int]:
    """Returns tier -> bytes of the second versions of a bucket."""
    sizes: dict[Tier, int] = dict.fromkeys(("device", "host", "disk"), 0)
    for kind, size in bucket.undo.items():
        tier = tiers.get(kind, "device")
        sizes["host" if kind == "param" and tier == "device" else tier] += size
    if work.undo_limit_bytes is not None:  # set apart for all buckets together
        sizes["device"] = sizes["host"] = 0
    return sizes


def _seconds(bucket: BucketBytes, tiers: dict[str, Tier], rates: Rates, work: Work) -> Seconds:
    size = {kind: bucket.kinds.get(kind, 0) for kind in ("param", "master", "grad", "state")}
    loaded = work.loads * work.micro_batches * size["param"]
    load_disk = loaded / rates.disk_read if tiers.get("param") == "disk" else 0.0
    load_link = loaded / rates.link if tiers.get("param") in ("host", "disk") else 0.0
    host = link = disk = device = 0.0
    if "grad" in tiers:
        # One pass: masters and states are read and written, gradients read, parameters written.
        traffic = 2 * size["master"] + size["grad"] + 2 * size["state"] + bucket.copy_bytes
        added = 3 * (work.micro_batches - 1) * size["grad"]
        if tiers["grad"] == "device":
            device = (traffic + added) / rates.device
        else:
            # Each second version is read from the first one and written.
            kept = 2 * sum(size for kind, size in bucket.undo.items() if tiers.get(kind) != "disk")
            host = (traffic + added + kept) / rates.host
            link = work.micro_batches * size["grad"] / rates.link
            if tiers.get("param", "device") == "device":
                link += bucket.copy_bytes / rates.link
    if tiers.get("param") == "disk":
        disk += size["param"] / rates.disk_write
    for kind in ("master", "state"):
        if tiers.get(kind) == "disk":
            disk += size[kind] / rates.disk_read + size[kind] / rates.disk_write
    if tiers.get("grad") == "disk":
        k = work.micro_batches
        disk += size["grad"] * (k / rates.disk_read + k / rates.disk_write)
    return Seconds(load_link=load_link, load_disk=load_disk, host=host, link=link, disk=disk, device=device)
