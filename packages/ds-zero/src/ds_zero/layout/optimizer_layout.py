"""Determines which optimizers can work on shards, and which need whole tensors.

[Note: three kinds of optimizer]
element-wise      Each element is updated independently (AdamW). The flat layout shards tensors at any element.
by segments       The update of an element needs a few sums over its tensor (LAMB). The flat layout is used, and the
                  sums are added over ranks between two passes (`interfaces.SegmentStep`).
on whole tensors  Any other optimizer that updates each tensor independently (Muon, Adafactor), in the whole layout.
Optimizers that combine several tensors (LBFGS) are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero.interfaces import SegmentStep, WholeTensors

Layout = Literal["flat", "whole"]

_ELEMENTWISE = frozenset(
    [
        "Adam",
        "AdamW",
        "SGD",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adadelta",
        "Adagrad",
        "RMSprop",
        "Rprop",
        "ASGD",
        "FusedAdam",
        "FusedAdagrad",
        "FusedLion",
        "FusedSGD",
        "CPUAdam",
        "CPUAdagrad",
        "CPULion",
        "CPUSGD",
        "CPUAdamW",
        "Lion",
    ]
)
_WHOLE: Mapping[str, str] = {
    "Lamb": "its trust ratio is a norm over a whole tensor",
    "LARS": "its trust ratio is a norm over a whole tensor",
    "Muon": "it orthogonalises whole matrices",
    "Adafactor": "it factors whole matrices",
}
_REFUSED: Mapping[str, str] = {
    "LBFGS": "it evaluates the loss inside step() and computes dot products over all parameters",
    "SparseAdam": "shards have dense gradients; use Adam",
}


def undivided_groups(optimizer: Optimizer, wanted: Layout | None, stage: int) -> list[bool]:
    """Returns for each group whether its tensors must stay whole.

    Raises:
        ValueError: the optimizer cannot work on shards, or not with the layout `wanted`.
    """
    name = type(optimizer).__name__
    groups = optimizer.param_groups
    if name in _REFUSED and (stage > 0 or name == "LBFGS"):
        raise ValueError(f"{name} does not work on shards: {_REFUSED[name]}. Use AdamW, or stage 0")
    if wanted == "whole":
        return [True for _ in groups]
    if isinstance(optimizer, WholeTensors):
        needs = [optimizer.needs_whole(group) for group in groups]
    elif name in _WHOLE:
        needs = [True for _ in groups]
    elif name in _ELEMENTWISE or isinstance(optimizer, SegmentStep) or _declared(optimizer):
        needs = [False for _ in groups]
    elif stage == 0:
        # Nothing is sharded, and every optimizer can update a tensor in its own shape.
        return [True for _ in groups]
    else:
        needs = [_needs_whole(optimizer, flat=wanted == "flat")] * len(groups)
    if wanted == "flat" and any(needs):
        why = _WHOLE.get(name, "its needs_whole says so")
        raise ValueError(
            f'{name} needs whole tensors ({why}), but the flat layout splits them: pass layout="whole" or None'
        )
    return needs


def _declared(optimizer: Optimizer) -> bool:
    return bool(getattr(type(optimizer), "elementwise", False))


def _needs_whole(optimizer: Optimizer, *, flat: bool) -> bool:
    """Tests an unknown optimizer on two small matrices: together, one by one, and split in two.

    Args:
        flat: only the flat layout is wanted.
    """
    name = type(optimizer).__name__
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 6, generator=generator) for _ in range(2)]
    grads = [[torch.randn(4, 6, generator=generator) for _ in values] for _ in range(3)]
    advice = (
        "If it updates every element independently, set the class attribute `elementwise = True` on it; if it "
        'updates every tensor independently, pass layout="whole"; else use stage 0'
    )

    def run(which: Sequence[int], split: Callable[[Tensor], list[Tensor]]) -> Tensor:
        params = [nn.Parameter(part.clone()) for i in which for part in split(values[i])]
        options: dict[str, Any] = {k: copy.deepcopy(v) for k, v in optimizer.defaults.items()}
        trial = type(optimizer)(params, **options)
        for step in grads:
            parts = [part.clone() for i in which for part in split(step[i])]
            for param, part in zip(params, parts, strict=True):
                param.grad = part
            trial.step()
        return torch.cat([p.detach().reshape(-1) for p in params])

    def attempt(which: Sequence[int], split: Callable[[Tensor], list[Tensor]], what: str) -> Tensor:
        try:
            return run(which, split)
        except Exception as error:
            raise ValueError(
                f"{name} could not be tested on {what} ({type(error).__name__}: {error}). {advice}"
            ) from error

    together = attempt([0, 1], lambda t: [t], "a matrix")
    apart = torch.cat([attempt([i], lambda t: [t], "a matrix") for i in range(len(values))])
    if not torch.allclose(together, apart, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"{name} gives another result if a tensor is stepped without the others, so its tensors cannot be "
            "divided among ranks: use an optimizer that updates tensors independently, or stage 0"
        )
    try:
        cut = attempt([0, 1], lambda t: [t.reshape(-1)[:10], t.reshape(-1)[10:]], "a 1-D shard")
    except ValueError:
        if flat:
            raise
        return True
    needs = not torch.allclose(together, cut, rtol=1e-4, atol=1e-6)
    if needs and flat:
        raise ValueError(
            f"{name} gives another result if a tensor is split in two, so it cannot work on flat shards: "
            'pass layout="whole" or None'
        )
    return needs
