"""A profile as text: a summary, the largest modules at each depth, and the model with the figures of every module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ds_profiler.flops.profile import ModuleProfile, Profile

_SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_WIDTH = 100


def count_text(value: float, unit: str = "", precision: int = 2) -> str:
    """A count with a decimal prefix: 1234567 is "1.23 M", and with the unit FLOPS "1.23 MFLOPS"."""
    for scale, prefix in _SCALES:
        if abs(value) >= scale:
            return f"{value / scale:.{precision}f} {prefix}{unit}".rstrip()
    text = (
        f"{value:.{precision}f}" if isinstance(value, float) and not value.is_integer() else f"{int(value)}"
    )
    return f"{text} {unit}".rstrip()


def seconds_text(value: float, precision: int = 2) -> str:
    """A time: "1.50 s", "2.30 ms" or "45.00 us"."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.{precision}f} {unit}"
    return f"{value * 1e6:.{precision}f} us"


def rate_text(flops: float, seconds: float) -> str:
    """Operations per second; "-" if no time was measured."""
    return count_text(flops / seconds, "FLOPS") if seconds > 0 else "-"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the report says about the job around the model."""

    step: int | None = None
    """The training step that was profiled; None if it was not a step of training."""
    ranks: int = 1
    batch: int | None = None
    """Samples of one forward on one rank; None if unknown."""
    step_s: float | None = None
    """Duration of the step, optimizer included; None if it was not measured."""
    recompute_factor: float = 0.0
    """Part of the forward that the backward runs again, where that can't be observed. Recomputation that was observed
    is counted in its place.
    """


def text(
    profile: Profile, *, depth: int = -1, top: int = 1, detailed: bool = True, job: Job | None = None
) -> str:
    """The whole report.

    Args:
        depth: the depth of which the largest modules are listed; -1 lists them at every depth.
        top: how many modules are listed at a depth.
        detailed: add the tree of all modules.
        job: what is known about the training around it.

    Raises:
        ValueError: `top` is below 1, or `depth` below -1.
    """
    if top < 1 or depth < -1:
        raise ValueError(f"top={top} must be at least 1, and depth={depth} at least -1 (every depth)")
    parts = [*_summary(profile, job or Job()), "", *_largest(profile, depth, top)]
    if detailed:
        parts += ["", *_tree(profile)]
    return "\n".join([*parts, "-" * _WIDTH])


def _rule(title: str) -> str:
    return f" {title} ".center(_WIDTH, "-")


def _summary(profile: Profile, job: Job) -> Iterator[str]:
    model = profile.model
    forward, backward, again = profile.forward, profile.backward, model.recomputed
    repeated = again.flops or job.recompute_factor * forward.flops
    yield _rule("FLOPs profile" + ("" if job.step is None else f" of step {job.step}"))
    yield "Of this rank. M, G, T: 10^6, 10^9, 10^12. MAC: one multiply-accumulate, 2 FLOPs. FLOPS: FLOPs per second."
    yield ""
    rows: list[tuple[str, str]] = [("ranks", str(job.ranks))] if job.ranks > 1 else []
    if job.batch is not None:
        rows.append(("samples of a micro-batch", str(job.batch)))
    rows += [
        ("parameters", count_text(model.params)),
        ("forwards of the model", str(profile.forwards)),
        ("forward MACs", count_text(forward.macs, "MACs")),
        ("forward FLOPs", count_text(forward.flops)),
        ("forward time", seconds_text(model.forward_s)),
        ("forward FLOPS", rate_text(model.forward.flops, model.forward_s)),
    ]
    if backward.flops:
        rows += [
            ("backward FLOPs", count_text(backward.flops)),
            ("recomputed forward FLOPs", count_text(repeated)),
            ("time of operations in backward", seconds_text(model.backward_s)),
        ]
    if job.step_s is not None:
        total = forward.flops + backward.flops + repeated
        rows += [
            ("time of the step", seconds_text(job.step_s)),
            ("FLOPS of the step", rate_text(total, job.step_s)),
            ("FLOPS without recomputation", rate_text(forward.flops + backward.flops, job.step_s)),
        ]
        if job.batch is not None:
            samples = job.batch * job.ranks * max(profile.forwards, 1)
            rows.append(("samples per second, all ranks", f"{samples / job.step_s:.2f}"))
    width = max(len(name) for name, _ in rows)
    yield from (f"{name + ':':<{width + 2}}{value}" for name, value in rows)
    if profile.unknown:
        calls = ", ".join(f"{name} ({count} calls)" for name, count in sorted(profile.unknown.items()))
        yield f"Not counted, because these operations have no formula: {calls}"


def _largest(profile: Profile, depth: int, top: int) -> Iterator[str]:
    """The classes of modules with the largest figures at each depth, as sums over the modules of a class."""
    yield _rule("Largest classes of modules by depth")
    levels: dict[int, list[ModuleProfile]] = {}
    for level, module in profile.model.walk():
        levels.setdefault(level, []).append(module)
    deepest = max(levels)
    shown = range(deepest + 1) if depth == -1 else [min(depth, deepest)]
    figures: tuple[tuple[str, Callable[[ModuleProfile], float], Callable[[float], str]], ...] = (
        ("parameters", lambda m: m.params, count_text),
        ("MACs", lambda m: m.forward.macs, lambda v: count_text(v, "MACs")),
        ("forward time", lambda m: m.forward_s, seconds_text),
    )
    for level in shown:
        yield f"depth {level}:"
        for title, figure, show in figures:
            sums: dict[str, float] = {}
            for module in levels[level]:
                sums[module.kind] = sums.get(module.kind, 0) + figure(module)
            best = sorted(sums.items(), key=lambda item: -item[1])[:top]
            yield f"    {title:<13} " + ", ".join(f"{kind}: {show(value)}" for kind, value in best)


def _tree(profile: Profile) -> Iterator[str]:
    yield _rule("All modules")
    yield "parameters (share) | forward MACs (share) | forward time (share) | forward FLOPS | backward FLOPs"
    yield "Shares are of the whole model. Parameters that modules share are counted in each of them."
    whole = profile.model
    for level, module in whole.walk():
        label = module.name.rpartition(".")[2]
        head = f"({label}): {module.kind}" if label else module.kind
        details = module.details.replace("\n", " ")
        if not module.children and details:
            head += f"({details})"
        figures = " | ".join(
            (
                f"{count_text(module.params)} ({_share(module.params, whole.params)})",
                f"{count_text(module.forward.macs, 'MACs')} ({_share(module.forward.macs, whole.forward.macs)})",
                f"{seconds_text(module.forward_s)} ({_share(module.forward_s, whole.forward_s)})",
                rate_text(module.forward.flops, module.forward_s),
                count_text(module.backward.flops),
            )
        )
        yield f"{'  ' * level}{head}: {figures}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
