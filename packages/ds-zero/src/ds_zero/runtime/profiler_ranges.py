"""Names for what a profile shows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def span(name: str) -> AbstractContextManager[object]:
    """A named range in a profile; nothing, and at no cost, where nobody profiles."""
    return torch.profiler.record_function(name) if torch._C._autograd._profiler_enabled() else _NOTHING
