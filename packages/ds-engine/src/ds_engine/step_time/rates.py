"""The rates of a machine and its links, given or measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any


class RatesError(ValueError):
    """Rates that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Messages between ranks. A collective in which each rank sends `num_bytes` takes `latency_s` times the base-2
    logarithm of the number of ranks, and `num_bytes / bytes_per_s`.
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float, ranks: int, messages: int = 1) -> float:
        """Duration of `messages` collectives that send `num_bytes` from each rank together."""
        if ranks == 1 or (num_bytes == 0 and messages == 0):
            return 0.0
        return messages * self.latency_s * math.ceil(math.log2(ranks)) + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one rank can do per second while all ranks of its machine work."""

    forward_flops_per_s: float
    """Operations of the forward: not the peak of the device, but what models reach."""
    backward_flops_per_s: float
    memory_bytes_per_s: float
    """Memory that the optimizer reads and writes; host memory if it runs there."""
    gather: Link
    """All-gathers between the ranks of a machine; between all ranks if `between_hosts` is None."""
    reduce: Link
    """Reduce-scatters, likewise. An all-reduce is a reduce-scatter and an all-gather."""
    between_hosts: Link | None = None
    """Messages of one rank to other machines; None: all ranks are on one machine."""
    ranks_per_host: int = 8
    """Used only with `between_hosts`."""
    forward_pass_s: float = 0.0
    """What every forward takes besides its operations, however few samples it has."""
    backward_pass_s: float = 0.0
    update_s: float = 0.0
    """What every update takes besides the memory that it reads and writes."""
    shared_update_s: float = 0.0
    """What it takes in addition where ranks divide the state, such as adding up the norm of gradients."""
    gather_unit_s: float = 0.0
    """Time of the rank itself for each unit that is gathered in a pass: hooks, buffers, views."""
    occupies: float = 0.0
    """Part of the duration of a collective during which its rank cannot compute: 0 with a network card of its own, 1 if
    the cores that compute also copy.
    """
    device_host_bytes_per_s: float = 2e10
    """Copies between device and host memory, in each direction."""
    disk_read_bytes_per_s: float = 3e9
    disk_write_bytes_per_s: float = 2e9

    price_per_rank_hour: float = 0.0
    """What one rank costs in an hour, in any currency; 0: unknown, and no cost is predicted."""

    def links(self, ranks: int) -> tuple[Link, Link]:
        """The links of gathers and of reductions within this number of consecutive ranks. A ring over several machines
        is as fast as its slowest link.
        """
        far = self.between_hosts
        if far is None or ranks <= self.ranks_per_host:
            return self.gather, self.reduce
        return tuple(  # type: ignore[return-value]
            Link(
                latency_s=max(near.latency_s, far.latency_s),
                bytes_per_s=min(near.bytes_per_s, far.bytes_per_s),
            )
            for near in (self.gather, self.reduce)
        )

    def to_json(self) -> str:
        return json.dumps({k: v for k, v in asdict(self).items() if v is not None}, indent=1)


_MAY_BE_ZERO = (
    "forward_pass_s",
    "backward_pass_s",
    "update_s",
    "shared_update_s",
    "gather_unit_s",
    "price_per_rank_hour",
)


def read_rates(path: str | Path) -> Rates:
    """Reads a JSON object with the fields of `Rates`.

    In place of `forward_flops_per_s` and `backward_flops_per_s` there may be `flops_per_s`; in place of `gather` and
    `reduce` there may be `link`, or `measured`, the result of `ds comm bench --json`.

    Raises:
        RatesError: the file is broken, a field is missing, unknown, or not a positive number.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RatesError(f"{path}: {error}") from error
    if not isinstance(given, dict):
        raise RatesError(f"{path} must hold a JSON object")
    try:
        return rates_of(given)
    except RatesError as error:
        raise RatesError(f"{path}: {error}") from None


def rates_of(given: Mapping[str, Any]) -> Rates:
    """As `read_rates`, from the object itself."""
    values = dict(given)
    both = values.pop("flops_per_s", None)
    if both is not None:
        values = {"forward_flops_per_s": both, "backward_flops_per_s": both} | values
    link = values.pop("link", None)
    if link is not None:
        values = {"gather": link, "reduce": link} | values
    measured = values.pop("measured", None)
    if measured is not None:
        values |= {
            name: fitted([row for row in measured if row["collective"] == collective])
            for name, collective in (("gather", "all_gather"), ("reduce", "reduce_scatter"))
        }
    known = {field.name for field in fields(Rates)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise RatesError(f"there is no rate {unknown[0]!r}; there are {', '.join(sorted(known))}")
    missing = [f.name for f in fields(Rates) if f.name not in values and f.default is MISSING]
    if missing:
        raise RatesError(f"{missing[0]!r} is missing")
    return Rates(**{name: _value(name, value) for name, value in values.items()})


def fitted(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Latency and rate of the fastest transport, from collectives of two or more sizes: of the smallest one the time is
    latency, and the rate is that between the smallest and the largest.

    Raises:
        RatesError: there are fewer than two sizes.
    """
    fastest: dict[float, float] = {}
    ranks = 2
    for row in rows:
        ranks = int(row["ranks"])
        sent = float(row["bytes"]) * (ranks - 1) / ranks
        fastest[sent] = min(fastest.get(sent, math.inf), float(row["seconds"]))
    if len(fastest) < 2:
        raise RatesError(
            "`measured` needs all_gather and reduce_scatter in at least two sizes: ds comm bench --json"
        )
    small, large = min(fastest), max(fastest)
    rate = (large - small) / max(fastest[large] - fastest[small], 1e-9)
    latency = max(fastest[small] - small / rate, 1e-7) / math.ceil(math.log2(max(ranks, 2)))
    return {"latency_s": latency, "bytes_per_s": rate}


def _value(name: str, value: Any) -> Any:
    if name in ("gather", "reduce", "between_hosts"):
        if not isinstance(value, Mapping) or set(value) != {"latency_s", "bytes_per_s"}:
            raise RatesError(f'{name!r} must be an object with "latency_s" and "bytes_per_s"')
        return Link(**{key: _number(f"{name}.{key}", number) for key, number in value.items()})
    if name == "occupies":
        if isinstance(value, (int, float)) and 0 <= value <= 1:
            return float(value)
        raise RatesError(f"'occupies' is {value!r}: it must be a number from 0 to 1")
    if name in _MAY_BE_ZERO and value == 0:
        return 0.0
    if name == "ranks_per_host":
        return int(_number(name, value))
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise RatesError(f"{name!r} is {value!r}: it must be a number above 0")
    return float(value)
