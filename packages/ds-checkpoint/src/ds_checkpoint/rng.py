"""Random generators of one rank: Python's, NumPy's, torch's on the CPU and on the accelerator."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Values = dict[str, Any]


def capture(rank: int) -> tuple[Values, dict[str, Tensor]]:
    """Returns the states as JSON values and named tensors, for `restore`."""
    version, words, gauss = random.getstate()
    blobs = {
        f"rng/{rank}/torch": torch.get_rng_state(),
        f"rng/{rank}/python": torch.tensor(words, dtype=torch.int64),
    }
    values: Values = {"python": [version, gauss]}
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state(legacy=True)
        blobs[f"rng/{rank}/numpy"] = torch.tensor(keys.tolist(), dtype=torch.int64)
        values["numpy"] = [str(name), int(position), int(has_gauss), float(cached)]
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None:
        blobs[f"rng/{rank}/{device.type}"] = torch.get_device_module(device).get_rng_state()
        values["device"] = device.type
    return values, blobs


def restore(rank: int, values: Values, blob: Callable[[str], Tensor]) -> None:
    """Restores this rank's generators to the state at the call of `capture`."""
    torch.set_rng_state(blob(f"rng/{rank}/torch"))
    version, gauss = values["python"]
    random.setstate((version, tuple(blob(f"rng/{rank}/python").tolist()), gauss))
    if "numpy" in values and "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        name, position, has_gauss, cached = values["numpy"]
        keys = numpy.array(blob(f"rng/{rank}/numpy").tolist(), dtype=numpy.uint32)
        numpy.random.set_state((name, keys, position, has_gauss, cached))
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is not None and values.get("device") == device.type:
        torch.get_device_module(device).set_rng_state(blob(f"rng/{rank}/{device.type}"))


def derive(rank: int, step: int) -> None:
    """Seeds the generators differently for each rank and step, for a checkpoint from another number of ranks."""
    # Any injective function will do; the factor keeps (rank, step) pairs distinct, and away from the small seeds that
    # people choose.
    seed = (step * 1_000_003 + rank + 1) % 2**63
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
