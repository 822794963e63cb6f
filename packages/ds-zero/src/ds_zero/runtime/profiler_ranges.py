"""Named ranges in profiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """Context manager that records a named range if the profiler is active, without overhead otherwise."""
    return torch.profiler.record_function(name) if torch._C._autograd._profiler_enabled() else _NOTHING
