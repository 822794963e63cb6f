"""Selective recomputation: which operators' outputs are kept in forward, and are not computed again in backward."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

KeepOutputs = Collection[str] | Callable[[str, int], bool]
"""Names of operators, such as "aten::mm", and of `GROUPS`; or a function from the name of an operator and the number of
its calls before this one in the layer to whether the output is kept.
"""

GROUPS: Mapping[str, frozenset[str]] = {
    "matmuls": frozenset(
        f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm")
    ),
    "attention": frozenset(
        f"aten::_scaled_dot_product_{name}"
        for name in (
            "flash_attention",
            "flash_attention_for_cpu",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
    )
    | {"flex_attention"},
}
"""Operators that take long to compute, for the memory of their outputs. Everything else in a layer is limited by memory
bandwidth, and is cheap to compute again.

Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2022), section 5.
"""


def check(keep: KeepOutputs) -> None:
    """Raises ValueError for a name that no operator of torch has."""
    if callable(keep):
        return
    if isinstance(keep, str):
        raise ValueError(f"keep_outputs={keep!r}: it is a list of names")
    for name in keep:
        if name in GROUPS:
            continue
        space, separator, operator = name.partition("::")
        # Other libraries may register their operators later.
        if not separator or (space == "aten" and not hasattr(torch.ops.aten, operator)):
            raise ValueError(
                f"keep_outputs: there is no operator {name!r}; names are like 'aten::mm', or {sorted(GROUPS)}"
            )


def contexts(keep: KeepOutputs) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns the contexts of one call of a layer: for its forward, which keeps outputs, and for its recomputation,
    which takes them.
    """
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    names = frozenset[str]() if callable(keep) else frozenset().union(*(GROUPS.get(n, {n}) for n in keep))
    calls: Counter[tuple[bool, str]] = Counter()

    def policy(ctx: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        schema = getattr(operator, "_schema", None)
        name = schema.name if schema is not None else operator.name()
        before = calls[ctx.is_recompute, name]
        calls[ctx.is_recompute, name] += 1
        kept = keep(name, before) if callable(keep) else name in names
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    forward, recompute = create_selective_checkpoint_contexts(policy)
    return _OwnCasts(forward), _OwnCasts(recompute)


class _OwnCasts(contextlib.AbstractContextManager[None]):
    """Enters another context, without autocast's cache of weights: a layer that is called twice would cast them in the
    first forward only, but in each recomputation, which must have the operators of its forward.
    """

    def __init__(self, inner: AbstractContextManager[Any]) -> None:
        self._inner = inner
        self._cached = True

    def __enter__(self) -> None:
        self._inner.__enter__()
        self._cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error: Any) -> None:
        torch.set_autocast_cache_enabled(self._cached)
        self._inner.__exit__(*error)
