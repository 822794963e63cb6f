"""The index of one measure on disk: the value of each sample, and the samples in ascending order of values.

A folder with `manifest.json` and three arrays that are mapped into memory, not read: `values.npy` (sample -> value),
`order.npy` (samples by ascending value; equal ones in the order of the data set) and `sorted.npy` (their values). It
appears whole or not at all. DeepSpeed's files of the same purpose (`*_index_to_sample`, `*_index_to_metric`,
`*_sample_to_metric`, each `.bin` and `.idx`) are read, too.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

MANIFEST = "manifest.json"
FORMAT = 1
_ARRAYS = ("values", "order", "sorted")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = dict(
    enumerate((np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint32, np.uint64), start=1)
)
"""Code in an index file -> dtype."""


@dataclass(frozen=True, kw_only=True)
class MetricIndex:
    """A measure of every sample."""

    path: str
    order: Array
    """Samples by ascending value."""
    sorted: Array | None
    """Their values; None if the files do not contain them, which is enough for percentiles."""
    given: Array | None = None
    """Sample -> value, if the files contain it."""

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def values(self) -> Array:
        """Sample -> value."""
        if self.given is not None:
            return self.given
        values = np.empty(len(self.order), dtype=self._ascending.dtype)
        values[self.order] = self._ascending
        return values

    def below(self, value: float) -> int:
        """Returns the number of samples whose value is at most `value`; they are the first ones of `order`."""
        ascending = self._ascending
        if np.issubdtype(ascending.dtype, np.integer):
            # In the dtype of the array; otherwise numpy would convert the whole array each time.
            limits = np.iinfo(ascending.dtype)
            if value < limits.min:
                return 0
            value = ascending.dtype.type(math.floor(min(value, limits.max)))
        return int(np.searchsorted(ascending, value, side="right"))

    @property
    def least(self) -> float:
        return float(self._ascending[0])

    @property
    def _ascending(self) -> Array:
        if self.sorted is None:
            raise ValueError(
                f"{self.path}: the file of values is missing, and difficulties are values: give index_to_metric_path, "
                'or difficulty_type "percentile"'
            )
        return self.sorted


def write_index(folder: Path, values: Array) -> None:
    """Writes the index of one measure, and replaces an existing one.

    Raises:
        ValueError: there are no samples, more than one number per sample, or a NaN.
    """
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"{folder}: a measure must have one number for each sample, but the array has shape {values.shape}"
        )
    if np.isnan(values).any():
        raise ValueError(
            f"{folder}: sample {int(np.isnan(values).argmax())} has the value NaN, which cannot be ordered"
        )
    order = np.argsort(values, kind="stable").astype(
        np.uint32 if values.size <= np.iinfo(np.uint32).max else np.int64
    )
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    made.mkdir(parents=True)
    checksums = {}
    for name, array in zip(_ARRAYS, (values, order, values[order]), strict=True):
        np.save(made / f"{name}.npy", array)
        checksums[name] = zlib.crc32(np.ascontiguousarray(array).data)
    text = json.dumps({"format": FORMAT, "num_samples": int(values.size), "crc32": checksums})
    (made / MANIFEST).write_text(text, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(made, folder)


def open_index(to_sample: str, to_metric: str | None = None) -> MetricIndex:
    """Opens the index in the folder `to_sample`, or in the folder of a file of that name; or DeepSpeed's, whose two
    files are named with or without extension.

    Raises:
        FileNotFoundError: neither exists.
        ValueError: the format is unknown, or the files contradict each other.
    """
    for folder in (Path(to_sample), Path(to_sample).parent):  # the second: DeepSpeed's name of a file in it
        if (folder / MANIFEST).exists():
            return _own(folder)
    rows = _Foreign.open(to_sample)
    values = None if to_metric is None else _Foreign.open(to_metric)
    if values is not None and len(values.sizes) != len(rows.sizes):
        raise ValueError(f"{to_sample} has {len(rows.sizes)} rows, {to_metric} has {len(values.sizes)}")
    ascending = None if values is None else np.repeat(values.flat, rows.sizes)
    return MetricIndex(path=to_sample, order=rows.flat, sorted=ascending)


def open_values(folder: str, metric: str) -> Array:
    """Returns sample -> value of `<folder>/<metric>`, ours or DeepSpeed's.

    Raises:
        FileNotFoundError: neither exists.
    """
    own = Path(folder) / metric
    if (own / MANIFEST).exists():
        return _own(own).values
    return _Foreign.open(str(own / f"{metric}_sample_to_metric")).flat


def _own(folder: Path) -> MetricIndex:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder} has format {manifest['format']}, this version reads {FORMAT}")
    values, order, ascending = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    for name, array in zip(_ARRAYS, (values, order, ascending), strict=True):
        if len(array) != manifest["num_samples"]:
            raise ValueError(f"{folder / name}.npy has {len(array)} entries, not {manifest['num_samples']}")
    return MetricIndex(path=str(folder), order=order, sorted=ascending, given=values)


@dataclass(frozen=True, kw_only=True)
class _Foreign:
    """Rows of numbers in DeepSpeed's form: lengths in one file, and what they hold, one after the other, in another."""

    sizes: Array
    flat: Array

    @classmethod
    def open(cls, path: str) -> _Foreign:
        base = path.removesuffix(".idx").removesuffix(".bin")
        for ending in (".idx", ".bin"):
            if not Path(base + ending).exists():
                raise FileNotFoundError(
                    f"{path}: found neither a folder with {MANIFEST} nor a file {base}{ending}; make the index "
                    "with "
                    "ds_engine.sampling.Analyzer"
                )
        head = struct.calcsize("<9sQBQQ")
        with Path(base + ".idx").open("rb") as file:
            magic, version, code, rows, _ = struct.unpack("<9sQBQQ", file.read(head))
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise ValueError(f"{base}.idx is not an index of DeepSpeed, or has an unknown version")
        sizes = np.memmap(base + ".idx", dtype=np.int32, mode="r", offset=head, shape=(rows,))
        flat = np.memmap(base + ".bin", dtype=_DTYPES[code], mode="r")
        if int(sizes.sum(dtype=np.int64)) != len(flat):
            raise ValueError(f"{base}.bin has {len(flat)} numbers, but its index says {int(sizes.sum())}")
        return cls(sizes=sizes, flat=flat)
