"""Measures the difference of two trainings, tensor by tensor, in units in the last place (ULP), and its bounds.

[Note: bounds of rounding]
Over many steps, two trainings whose arithmetic differs may diverge without limit: if the terms of a gradient element
nearly cancel, rounding may change its sign, and Adam then moves the parameter by a learning rate in the other
direction. Within one step that starts from equal values, the effect of rounding is small and has known bounds. So after
a difference, the plain training continues from the sharded training's values, and each step is compared separately:

* Gradients: sums of the same numbers in another order differ by at most a few units in the last place of the sum of
  their absolute values (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2), in the least
  precise dtype in which they are added.
* Gradients after a forward that differs (as the loss shows), or may differ (accelerators choose kernels by alignment):
  the plain training is repeated with weights changed by one unit in the last place. The bound of a tensor is `FACTOR`
  times its largest change. If that is less, relative to the tensor's largest element, than the median over all tensors,
  the median is used, since a tensor with one element may change little by chance.
* Parameters and optimizer states: the plain training steps with the sharded training's gradient. The bound is `UNITS`
  units in the last place of the tensor's largest element.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

FACTOR = 4.0
"""Factor on the measured effect of rounding, which gives the bound."""
UNITS = 16.0
"""Allowed difference of two kernels, in units in the last place of a tensor's largest element."""

LOSS, GRADIENT, NORM, PARAMETER, BUFFER = "loss", "gradient", "gradient norm", "parameter", "buffer"
STATE = "state"
"""Prefix of the kind of an optimizer state; its name in the optimizer follows."""

_BITS: Mapping[int, torch.dtype] = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 8


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Returns an int64 tensor: the number of representable numbers between the elements of two tensors of one dtype.

    Zeros of either sign are equal, NaN equals NaN, and NaN has the largest distance from all other numbers.
    """
    bits = _BITS[a.element_size()]

    def ordered(x: Tensor) -> Tensor:
        # Floating-point numbers of one sign are ordered like their bits.
        raw = x.detach().contiguous().view(bits).to(torch.int64)
        lowest = torch.iinfo(bits).min
        return torch.where(raw < 0, lowest - raw, raw)

    far = torch.iinfo(torch.int64).max
    x, y = ordered(a), ordered(b)
    # The difference of 64-bit numbers of different signs may overflow.
    apart = torch.where(((x < 0) != (y < 0)) & (x.abs() > far - y.abs()), far, (x - y).abs())
    unknown = a.isnan() != b.isnan()
    return apart.masked_fill(a.isnan() & b.isnan(), 0).masked_fill(unknown, far)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One tensor or loss that differs from that of plain PyTorch in at least one bit."""

    step: int
    """Number of the optimizer step, from 1; 0 is before the first."""
    kind: str
    """"loss", "gradient" (mean over ranks, not clipped), "gradient norm", "parameter" and "state ..."
    (after the step), or "buffer"."""
    name: str
    """Name of the tensor in the model; for a loss, its micro-batch and rank."""
    module: str
    """The module that contains it, with its class."""
    max_ulp: int
    """Largest difference of an element in units in the last place; 2**63 - 1 if exactly one of them is NaN."""
    max_abs: float
    """The largest absolute difference."""
    at: tuple[int, ...]
    """Index of the element with the largest absolute difference."""
    found: float
    """Value of that element in the sharded training."""
    plain: float
    """Value of that element in plain PyTorch."""
    differing: int
    """Number of elements that differ."""
    numel: int
    bound: float | None = None
    """Largest absolute difference that rounding can explain; None before it was measured."""

    @property
    def within(self) -> bool:
        """Whether the difference is within `bound`, so that rounding explains it."""
        return self.bound is not None and self.max_abs <= self.bound

    def __str__(self) -> str:
        place = f" at {list(self.at)}" if self.at else ""
        ulp = "one side is NaN" if self.max_ulp == torch.iinfo(torch.int64).max else f"{self.max_ulp} ULP"
        said = f"{self.kind} of {self.name}" if self.kind != LOSS else f"loss of {self.name}"
        if self.module:
            said += f", module {self.module}"
        said += f": {self.found:.8g} instead of {self.plain:.8g}{place} (off by {self.max_abs:.3g}, {ulp}"
        if self.numel > 1:
            said += f"; {self.differing} of {self.numel} elements differ"
        return said + ("" if self.bound is None else f"; {self.bound:.3g} can be explained by rounding") + ")"


def compare(
    found: Tensor | None, plain: Tensor | None, *, step: int, kind: str, name: str, module: str = ""
) -> Difference | None:
    """Returns the difference of two tensors; None if they are bitwise equal (zeros of either sign are equal).

    A tensor that exists only on one side is compared with zeros, and has the largest ULP difference.
    """
    one_sided = (found is None) != (plain is None)
    if found is None and plain is None:
        return None
    if found is None or plain is None:
        there = found if found is not None else plain
        assert there is not None
        nothing = torch.full_like(there, math.nan)
        found, plain = (there, nothing) if plain is None else (nothing, there)
    found, plain = found.detach(), plain.detach().to(found.device)
    if not found.is_floating_point() or found.dtype != plain.dtype:
        found, plain = found.double(), plain.double()
    if torch.equal(found, plain):
        return None
    apart = ulps(found, plain).reshape(-1)
    if not int(apart.max()):
        return None  # NaN on both sides
    gap = (found.double() - plain.double()).abs().reshape(-1)
    gap = gap.masked_fill(apart == 0, 0.0)
    worst = int(gap.nan_to_num(nan=math.inf, posinf=math.inf).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), found.shape))
    return Difference(
        step=step,
        kind=kind,
        name=name,
        module=module,
        max_ulp=int(apart.max()),
        max_abs=math.inf if one_sided else float(gap[worst].nan_to_num(nan=math.inf, posinf=math.inf)),
        at=at,
        found=float(found.reshape(-1)[worst]),
        plain=float(plain.reshape(-1)[worst]),
        differing=int((apart != 0).sum()),
        numel=found.numel(),
    )


def measured(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, float]:
    """Returns bounds from the effect of perturbed weights, given name, original and perturbed value of all tensors of
    one kind.
    """
    gaps, scales, shares = {}, {}, []
    for name, plain, moved in pairs:
        if not plain.numel():
            continue
        scales[name] = scale = float(plain.abs().max())
        gap = float((plain.double() - moved.double()).abs().max())
        gaps[name] = gap if math.isfinite(gap) else math.inf
        if 0 < scale < math.inf and math.isfinite(gap):
            shares.append(gap / scale)
    usual = max(statistics.median(shares) if shares else 0.0, torch.finfo(torch.float32).eps)
    return {name: FACTOR * max(gaps[name], usual * scale) for name, scale in scales.items()}


def rounded(plain: Tensor) -> float:
    """Returns the bound for the result of one kernel."""
    scale = float(plain.abs().max()) if plain.numel() else 0.0
    return UNITS * torch.finfo(torch.float32).eps * scale if math.isfinite(scale) else math.inf


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of `verify`. `print` it, or check `ok`."""

    what: str
    """The configuration that was verified."""
    ranks: int
    steps: int
    """Number of optimizer steps that were compared."""
    tensors: int
    """Number of tensors that were compared in each step."""
    losses: tuple[float, ...]
    """Mean loss of every step in the sharded training."""
    plain_losses: tuple[float, ...]
    """Mean loss of every step in plain PyTorch."""
    differences: tuple[Difference, ...] = ()
    """All differences, in the order of training: losses, gradients from the loss backwards, parameters and states
    after the step.
    """
    notes: tuple[str, ...] = ()
    """Remarks about the result."""
    bitwise_wanted: bool = field(default=False, repr=False)
    """Whether only bitwise equality is accepted."""

    @property
    def exact(self) -> bool:
        """Whether every loss, gradient and parameter is bitwise that of plain PyTorch."""
        return not self.differences

    @property
    def ok(self) -> bool:
        """Whether it is exact, or rounding can explain every difference."""
        return self.exact if self.bitwise_wanted else self.first_beyond is None

    @property
    def first(self) -> Difference | None:
        """The first tensor that differs."""
        return self.differences[0] if self.differences else None

    @property
    def first_beyond(self) -> Difference | None:
        """The first tensor that differs by more than rounding can explain."""
        return next((d for d in self.differences if not d.within), None)

    def to_json(self) -> str:
        """Returns a JSON object; infinities and NaN become null."""
        made = {
            "ok": self.ok,
            "exact": self.exact,
            "first": None if self.first is None else _plain(self.first),
            "first_beyond": None if self.first_beyond is None else _plain(self.first_beyond),
            **asdict(replace(self, differences=())),
            "differences": [_plain(d) for d in self.differences[:100]],
            "num_differences": len(self.differences),
        }
        return json.dumps(_finite(made))

    def __str__(self) -> str:
        return "\n".join(
            [f"{self.what}, against plain PyTorch", *self._verdict(), *self._curve(), *self.notes]
        )

    def _verdict(self) -> list[str]:
        steps = f"{self.steps} step{'s' * (self.steps != 1)} of {self.tensors} tensors"
        if self.exact:
            return [f"EXACT: {steps}: every loss, gradient and parameter is bitwise the same"]
        assert self.first is not None
        beyond = self.first_beyond
        if beyond is None:
            near = max(self.differences, key=lambda d: d.max_abs / d.bound if d.bound else 0.0)
            head = "NOT EXACT" if self.bitwise_wanted else "WITHIN ROUNDING"
            return [
                f"{head}: {steps}: not bitwise equal, but rounding can explain all differences",
                f"  first difference, step {self.first.step}: {self.first}",
                f"  nearest to its bound, step {near.step}: {near}",
            ]
        lines = [f"DEVIATES in step {beyond.step}: {beyond}"]
        if self.first is not beyond:
            lines.append(f"  first difference at all, step {self.first.step}: {self.first}")
        same = [d for d in self.differences if d.step == beyond.step and d is not beyond and not d.within]
        lines += [f"  also in step {d.step}: {d}" for d in same[:_SHOWN]]
        more = sum(not d.within for d in self.differences) - 1 - len(same[:_SHOWN])
        return lines + ([f"  and {more} more, in this step and later"] if more > 0 else [])

    def _curve(self) -> list[str]:
        rows = list(zip(self.losses, self.plain_losses, strict=True))
        lines = ["step  loss           loss in plain PyTorch"]
        for i, (found, plain) in enumerate(rows):
            if i < _SHOWN or i == len(rows) - 1:
                lines.append(f"{i + 1:4d}  {found:<13.8g}  {plain:.8g}")
            elif i == _SHOWN:
                lines.append(" ...")
        return lines


def _plain(difference: Difference) -> dict[str, object]:
    return {**asdict(difference), "within": difference.within}


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
