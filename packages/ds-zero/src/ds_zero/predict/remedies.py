"""Finds the nearest settings that fit, for a job that does not, by planning them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ds_zero.predict.report import Plan, Remedy
from ds_zero.predict.simulate import Job

MAX_REMEDIES = 4
MAX_RUNS = 16
"""Maximum number of jobs that are run. Jobs whose states alone are too large are not run."""

_OFFLOADED = frozenset(["master", "grad"])
_MAX_RANKS = 4096


@dataclass(frozen=True)
class _Change:
    """A change of one setting by one or more steps."""

    name: str
    value: object
    text: str
    job: Callable[[Job], Job]


def nearest_that_fit(
    job: Job, planned: Callable[[Job], Plan], could_fit: Callable[[Job], bool]
) -> tuple[Remedy, ...]:
    """Returns the remedies with the fewest changes, at most `MAX_REMEDIES`; none if nothing fits.

    Changes of one setting are tried first (with its smallest sufficient step), then of two, and so on; more ranks
    come last. All are planned by `planned`, like the job itself. Jobs that `could_fit` excludes (from the states
    alone) are not run.
    """
    judge = _Judge(planned, could_fit)
    remedies: list[Remedy] = []
    settings = _settings(job)
    for count in range(1, len(settings) + 1):
        for chosen in combinations(settings, count):
            remedy = judge.smallest(job, chosen)
            if remedy is not None:
                remedies.append(remedy)
        if remedies:
            break
    if len(remedies) < MAX_REMEDIES:
        more = judge.more_ranks(job, ()) if job.stage > 0 else None  # at stage 0 more ranks save nothing
        more = more or judge.more_ranks(job, [setting[-1] for setting in settings])
        remedies += [more] if more is not None else []
    return tuple(remedies[:MAX_REMEDIES])


@dataclass
class _Judge:
    planned: Callable[[Job], Plan]
    could_fit: Callable[[Job], bool]
    runs: int = 0

    def verdict(self, job: Job, changes: Sequence[_Change]) -> Remedy | None:
        """Returns the changed job as a remedy if it fits."""
        for change in changes:
            job = change.job(job)
        if self.runs >= MAX_RUNS or not self.could_fit(job):
            return None
        self.runs += job.micro_batch is not None
        planned = self.planned(job)
        if not planned.fits:
            return None
        return Remedy(
            changes={change.name: change.value for change in changes},
            text=", ".join(change.text for change in changes),
            device_bytes=planned.device_bytes,
            host_bytes=planned.host_bytes,
        )

    def smallest(self, job: Job, settings: Sequence[Sequence[_Change]]) -> Remedy | None:
        """Returns the smallest changes of all these settings together that fit: if the largest do, smaller ones are
        tried.
        """
        furthest = [setting[-1] for setting in settings]
        best = self.verdict(job, furthest)
        if best is None:
            return None
        for i, setting in enumerate(settings):
            for notch in setting[:-1]:
                milder = self.verdict(job, [*furthest[:i], notch, *furthest[i + 1 :]])
                if milder is not None:
                    best, furthest[i] = milder, notch
                    break
        return best

    def more_ranks(self, job: Job, others: Sequence[_Change]) -> Remedy | None:
        """Returns the smallest multiple of the ranks by a power of two that fits."""
        ranks = job.num_ranks * 2
        while ranks <= _MAX_RANKS:
            changes = [*others, _ranks(ranks)]
            remedy = self.verdict(job, changes)
            if remedy is not None:
                return remedy
            ranks *= 2
        return None


def _ranks(count: int) -> _Change:
    return _Change("ranks", count, f"{count} ranks", lambda job: replace(job, num_ranks=count))


def _settings(job: Job) -> list[list[_Change]]:
    """Returns the settings that can be changed, each with its steps from the smallest to the largest change."""
    settings: list[list[_Change]] = []
    if job.stage < 3 and job.num_ranks > 1:
        settings.append([_stage(s) for s in range(job.stage + 1, 4)])
    if job.micro_batch is not None and not job.checkpointing:
        text = "activation checkpointing"
        settings.append([_Change("checkpointing", True, text, lambda j: replace(j, checkpointing=True))])
    size = batch_size(job.micro_batch)
    smaller = list(_halves(size))
    if smaller:
        settings.append([_micro_batch(n, size) for n in smaller])
    if not job.disk:
        text = "optimizer states and masters on the host"
        host = _Change("offload", True, text, lambda j: replace(j, offload=_OFFLOADED, tiers=None))
        text = "gradients, masters and optimizer states on a disk"
        disk = _Change(
            "disk",
            True,
            text,
            lambda j: replace(j, offload=frozenset(), disk=_OFFLOADED | {"state"}, tiers=None),
        )
        places = [] if job.on_cpu or job.offload else [host]
        places += [disk] if job.pageable else []
        settings += [places] if places else []
    return settings


def _stage(stage: int) -> _Change:
    def changed(job: Job) -> Job:
        return replace(job, stage=stage, config=replace(job.config, sparse_gradients=False))  # stage 0 only

    return _Change("stage", stage, f"stage {stage}", changed)


def _micro_batch(size: int, before: int) -> _Change:
    times = before // size

    def change(job: Job) -> Job:
        return replace(
            job,
            micro_batch=with_batch_size(job.micro_batch, size),
            accumulation_steps=job.accumulation_steps * times,
        )

    return _Change("micro_batch", size, f"micro-batches of {size} and {times} times as many", change)


def _halves(size: int) -> Iterator[int]:
    while size > 1 and size % 2 == 0:
        size //= 2
        yield size


def batch_size(micro_batch: Any) -> int:
    """Returns the first dimension of all tensors of a micro-batch; 0 if they differ."""
    tensors = [t for t in tree_flatten(micro_batch)[0] if isinstance(t, Tensor)]
    sizes = {t.shape[0] if t.ndim else 0 for t in tensors}
    return sizes.pop() if len(sizes) == 1 else 0


def with_batch_size(micro_batch: Any, size: int) -> Any:
    """Returns meta tensors of the same shapes with another first dimension.

    Raises:
        ValueError: tensors without a common first dimension.
    """
    if batch_size(micro_batch) == 0:
        raise ValueError(
            "the first dimensions of the example inputs differ, so the micro-batch cannot be resized: pass "
            "inputs of the size to plan"
        )
    flat, spec = tree_flatten(micro_batch)
    resized = [
        t.detach().new_empty((size, *t.shape[1:]), device="meta") if isinstance(t, Tensor) else t
        for t in flat
    ]
    return tree_unflatten(resized, spec)
