"""Small functions that code takes from DeepSpeed's utilities."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_compat.names import VERSION

version = VERSION
git_hash, git_branch = "ds-compat", "none"
__version_major__, __version_minor__, __version_patch__ = (
    int(p) for p in VERSION.partition("+")[0].split(".")
)
HAS_TRITON = False
dist = torch.distributed
installed_ops: dict[str, bool] = {}
compatible_ops: dict[str, bool] = {}
_orig_torch_arange = torch.arange
DeepSpeedOptimizerCallable = Callable[[Iterable[Any]], Optimizer]
DeepSpeedSchedulerCallable = Callable[[Optimizer], Any]
partitioned_param_data_shape = [0]
"""Shape of the memory of a divided parameter there; here such a parameter keeps its shape."""


def __getattr__(name: str) -> Any:
    if name == "partition_parameters":
        import sys

        return sys.modules["deepspeed.runtime.zero.partition_parameters"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    """`fn`: construction under zero.Init keeps dtypes here."""
    return fn


def required_torch_version(min_version: Any = None, max_version: Any = None) -> bool:
    """Whether torch is within the bounds."""
    own = _numbers(torch.__version__)
    assert min_version or max_version, "Must provide a min_version or max_version argument"
    return (min_version is None or own >= _numbers(str(min_version))) and (
        max_version is None or own <= _numbers(str(max_version))
    )


def _numbers(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def instrument_w_nvtx(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func`: torch.profiler shows what ds_zero does."""
    return func


def noop_decorator(func: Callable[..., Any]) -> Callable[..., Any]:
    return func


def get_caller_func(frame: int = 3) -> str:
    """Name of the function `frame` calls above."""
    return inspect.stack()[frame].function


def parse_range_list(range_str: str) -> list[int]:
    """Numbers from a text such as "0-3,8"; ValueError unless they rise."""
    numbers: list[int] = []
    for part in range_str.split(","):
        ends = [int(end) for end in part.split("-")]
        if len(ends) > 2 or ends[-1] < ends[0] or (numbers and ends[0] <= numbers[-1]):
            raise ValueError("Bad format in range string: Numbers must be in ascending order without overlap")
        numbers += range(ends[0], ends[-1] + 1)
    return numbers


def is_autotp_training_mode() -> bool:
    return False


def is_zero_supported_optimizer(optimizer: Optimizer) -> bool:
    """ds_zero tries every optimizer that it does not know, and refuses by name what cannot work."""
    return isinstance(optimizer, Optimizer)


def set_random_seed(seed: int) -> None:
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def ensure_directory_exists(filename: str) -> None:
    """The folder of a file."""
    os.makedirs(os.path.dirname(filename) or ".", exist_ok=True)


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """A call as text."""
    inside = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in kwargs.items()]
    return f"{base}({', '.join(inside)})"


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Borders of parts whose sizes differ by at most one, the larger ones first."""
    size, rest = divmod(num_items, num_parts)
    return [part * size + min(part, rest) for part in range(num_parts + 1)]


def get_only_unique_item(items: Iterable[Any]) -> Any:
    """The one value that all items have; RuntimeError if there are several."""
    distinct = set(items)
    if len(distinct) != 1:
        raise RuntimeError(f"expected there to be only one unique element in {items}")
    return distinct.pop()


def has_inf_or_nan(x: Tensor) -> bool:
    return not bool(torch.isfinite(x).all())


def get_global_norm(norm_list: Sequence[float]) -> float:
    """Root of the sum of squares."""
    return float(sum(norm**2 for norm in norm_list) ** 0.5)


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2, mpu: Any = None
) -> Tensor:
    """torch's, for models without an engine."""
    return nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)


def empty_cache() -> None:
    from ds_compat.device import get_accelerator

    get_accelerator().empty_cache()
