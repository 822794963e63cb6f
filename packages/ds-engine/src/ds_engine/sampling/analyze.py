"""Computes measures of all samples, once, with any number of workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ds_engine.sampling.index import write_index

Measure = Callable[[Any], Any]
"""A function from a batch to one number for each of its samples, as a tensor or array."""


class Analyzer:
    """Computes measures of every sample, and writes an index of each for `data_efficiency`.

    ::

        Analyzer(data, {"seqlen": lengths}, "metrics", collate_fn=list).run()

    Each worker measures an equal, contiguous part of the samples and writes a file; one worker merges the files.
    `run` does both: on the ranks of the process group if there is one, else in this process. On machines that share
    only a disk, call `measure(w, W)` on each of W machines, and then `merge(W)` on one. Files are complete or absent,
    so a worker can be repeated.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        measures: Mapping[str, Measure],
        folder: str | os.PathLike[str],
        *,
        totals: Mapping[str, Measure] | None = None,
        batch_size: int = 64,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        processes: int = 0,
    ) -> None:
        """
        Args:
            measures: name -> function from a collated batch to one number for each sample.
            folder: output directory, with a folder for each measure.
            totals: name -> function from a batch to an array. The sum over all batches is written to
                `<folder>/<name>/total.npy`, for example how often each token occurs.
            batch_size: number of samples in a batch.
            collate_fn: makes a batch from a list of samples. Default: torch's, which needs samples of equal shape.
            processes: number of worker processes that load, collate and measure; 0: this process.
        """
        self._dataset, self._folder = dataset, Path(folder)
        self._measures, self._totals = dict(measures), dict(totals or {})
        self._batch_size, self._collate_fn, self._processes = batch_size, collate_fn, processes
        both = self._measures.keys() & self._totals.keys()
        if both or not (self._measures or self._totals):
            raise ValueError(f"pass measures or totals under different names: {sorted(both) or 'none'}")
        self._num_samples = len(dataset)  # type: ignore[arg-type]

    def run(self) -> None:
        """Measures and merges. Collective if there is a process group. When it returns, every rank can read the
        result.
        """
        if not (dist.is_available() and dist.is_initialized()):
            self.measure()
            self.merge()
            return
        failure: BaseException | None = None
        for turn in (self.measure, self.merge):
            try:
                if turn == self.measure:
                    self.measure(dist.get_rank(), dist.get_world_size())
                elif dist.get_rank() == 0:
                    self.merge(dist.get_world_size())
            except Exception as error:  # noqa: BLE001 - the other ranks must not wait for this one for ever
                failure = error
            told: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(told, None if failure is None else repr(failure))
            if failure is not None:
                raise failure
            broken = {rank: text for rank, text in enumerate(told) if text is not None}
            if broken:
                raise RuntimeError(f"the analysis failed on rank {min(broken)}: {broken[min(broken)]}")

    def measure(self, worker: int = 0, workers: int = 1) -> None:
        """Measures the samples of this worker, and writes its files.

        Raises:
            ValueError: a function returned another number of values than there are samples. The message names it.
        """
        begin, end = self._share(worker, workers)
        values: dict[str, list[NDArray[Any]]] = {name: [] for name in self._measures}
        totals: dict[str, NDArray[Any]] = {}
        for batch in self._batches(begin, end):
            for name, found in batch.items():
                if name in values:
                    values[name].append(found)
                else:
                    totals[name] = found if name not in totals else totals[name] + found
        for name, parts in values.items():
            self._save(self._part(name, worker, workers), np.concatenate(parts) if parts else np.empty(0))
        for name in self._totals:
            self._save(self._part(name, worker, workers), totals.get(name, np.zeros(0)))

    def merge(self, workers: int = 1) -> None:
        """Makes the indices from the files of all workers, and removes these files.

        Raises:
            FileNotFoundError: a worker has not finished. The message names it.
        """
        for name in self._measures:
            write_index(self._folder / name, np.concatenate(self._load(name, workers)))
        for name in self._totals:
            made = self._folder / name
            made.mkdir(parents=True, exist_ok=True)
            self._save(made / "total.npy", np.sum(self._load(name, workers), axis=0))
        for name in (*self._measures, *self._totals):
            shutil.rmtree(self._folder / ".parts" / name, ignore_errors=True)

    def _share(self, worker: int, workers: int) -> tuple[int, int]:
        if not 0 <= worker < workers:
            raise ValueError(f"worker {worker} of {workers}: workers are numbered from 0")
        return worker * self._num_samples // workers, (worker + 1) * self._num_samples // workers

    def _batches(self, begin: int, end: int) -> Iterator[dict[str, NDArray[Any]]]:
        size = self._batch_size
        runs = [list(range(i, min(i + size, end))) for i in range(begin, end, size)]
        collate = _Measuring(self._measures, self._totals, self._collate_fn)
        yield from DataLoader(
            self._dataset, batch_sampler=runs, collate_fn=collate, num_workers=self._processes
        )

    def _part(self, name: str, worker: int, workers: int) -> Path:
        return self._folder / ".parts" / name / f"{worker}-of-{workers}.npy"

    @staticmethod
    def _save(path: Path, array: NDArray[Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}.npy")
        np.save(made, array)
        os.replace(made, path)

    def _load(self, name: str, workers: int) -> list[NDArray[Any]]:
        paths = [self._part(name, worker, workers) for worker in range(workers)]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {workers} workers have not finished {name!r}, first {missing[0]}"
            )
        parts = [np.load(path) for path in paths]
        return [part for part in parts if part.size] or parts[:1]  # a worker may have no samples


class _Measuring:
    """Collates and measures in the processes of the loader, so that only numbers are sent back."""

    def __init__(
        self,
        measures: Mapping[str, Measure],
        totals: Mapping[str, Measure],
        collate_fn: Callable[[list[Any]], Any] | None,
    ) -> None:
        self._measures, self._totals, self._collate_fn = measures, totals, collate_fn

    def __call__(self, samples: list[Any]) -> dict[str, NDArray[Any]]:
        collate = self._collate_fn or torch.utils.data.default_collate
        batch = collate(samples)
        numbers = {name: _array(function(batch)) for name, function in self._totals.items()}
        for name, function in self._measures.items():
            values = _array(function(batch)).reshape(-1)
            if len(values) != len(samples):
                raise ValueError(
                    f"measure {name!r} gave {len(values)} values for {len(samples)} samples: it must return one "
                    "number for each"
                )
            numbers[name] = values
        return numbers


def _array(value: Any) -> NDArray[Any]:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
