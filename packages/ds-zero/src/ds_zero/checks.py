"""Checks of the arguments of `shard`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.interfaces import PagesState
from ds_zero.tensors.storage import memory_key

STAGES: Mapping[int, str] = {
    0: "nothing",
    1: "optimizer states",
    2: "optimizer states and gradients",
    3: "optimizer states, gradients and parameters",
}

TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)


def check_stage(stage: int) -> None:
    """Raises ValueError unless `stage` is 0, 1, 2 or 3."""
    if stage not in STAGES or isinstance(stage, bool):
        meaning = "; ".join(f"{s} shards {what}" for s, what in STAGES.items())
        raise ValueError(f"stage={stage!r}: there are stages 0 to 3 ({meaning})")


def check_model(model: nn.Module) -> None:
    """Raises ValueError for parameters that cannot be moved into buckets without changing the result of the model."""
    if _registry.find(model) is not None:
        raise ValueError(
            "this model is sharded already: call ds_zero.destroy(model) before sharding it again"
        )
    if not any(True for _ in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to shard")
    seen: dict[int, tuple[str, nn.Parameter]] = {}
    for fqn, param in model.named_parameters():
        if param.layout is not torch.strided:
            raise ValueError(
                f"parameter {fqn!r} has layout {param.layout}: only dense parameters can be sharded"
            )
        if param.device.type == "meta" or param.numel() == 0:
            continue
        pointer = memory_key(param)
        other = seen.setdefault(pointer, (fqn, param))
        if other[1] is not param and _overlap(other[1], param):
            raise ValueError(
                f"parameters {other[0]!r} and {fqn!r} share memory but are different Parameter objects, so "
                "sharding would untie them: assign the same Parameter object to both modules"
            )
        hooks = getattr(param, "_post_accumulate_grad_hooks", None)
        if hooks:
            raise ValueError(
                f"parameter {fqn!r} has a post-accumulate-grad hook (an optimizer in backward?), which would get "
                "the gradient before it is reduced. Remove the hook, and call optimizer.step() after backward"
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(t: Tensor) -> tuple[int, int]:
        begin = int(t.storage_offset()) * t.element_size()
        extent = sum((n - 1) * abs(int(s)) for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        return begin, begin + extent * t.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raises ValueError unless `optimizer` has only parameters of `model`, with dtypes that can be trained."""
    names = {id(p): fqn for fqn, p in model.named_parameters()}
    _check_inner(optimizer, names)
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if id(param) not in names:
                raise ValueError(
                    f"param_groups[{g}]['params'][{i}] of shape {tuple(param.shape)} is not a parameter of the "
                    "model: construct the optimizer from model.parameters() of this model"
                )
            if param.dtype not in TRAINABLE:
                raise ValueError(
                    f"parameter {names[id(param)]!r} has dtype {param.dtype}, but masters are fp32: convert the "
                    f"model to one of {[str(d) for d in TRAINABLE]}, or leave the parameter out of the optimizer"
                )


def check_coverage(
    optimizer: Optimizer, trained: Iterable[nn.Parameter], names: Mapping[str, nn.Parameter]
) -> None:
    """Raises ValueError unless every parameter in `trained`, that is, with a master and gradients, is in a group of
    `optimizer`.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = {id(p) for p in trained} - held
    missing = [fqn for fqn, p in names.items() if id(p) in left]
    if missing:
        raise ValueError(
            f"the optimizer leaves out {len(missing)} parameters that require a gradient, the first are "
            f"{missing[:5]}: freeze "
            "them with requires_grad_(False) before ds_zero.shard(model), or pass the optimizer to ds_zero.shard"
        )


def _check_inner(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Raises ValueError if `optimizer` wraps other optimizers, which would still refer to parameters without
    gradients.
    """
    own = {id(group) for group in optimizer.param_groups}
    for attribute, inner in _inner(optimizer):
        for group in inner.param_groups:
            held = [names[id(p)] for p in group["params"] if id(p) in names]
            if held and id(group) not in own:
                raise ValueError(
                    f"{type(optimizer).__name__}.{attribute} is another optimizer ({type(inner).__name__}) with "
                    f"its own groups, which contain {held[0]!r}: only entries of the outer optimizer's "
                    "param_groups become shards. Put the inner groups themselves (the same dicts) into it, or pass "
                    "one optimizer"
                )


def _inner(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """Yields the wrapped optimizers with the name of the attribute; also those in lists or dicts."""
    for attribute, value in vars(optimizer).items():
        values = value.values() if isinstance(value, dict) else value
        for inner in values if isinstance(values, Iterable) else [values]:
            if isinstance(inner, Optimizer):
                yield attribute, inner


def check_states_in_memory(optimizer: Optimizer) -> None:
    """Raises ValueError for an optimizer that keeps its states away, of which no checksums can be taken."""
    if isinstance(optimizer, PagesState):
        raise ValueError(
            f"ZeroConfig(checksums=True): {type(optimizer).__name__} keeps its states away, but checksums of shards "
            "are computed from tensors in memory: use the optimizer without it, or remove checksums (a store on a disk "
            "has checksums of its own)"
        )
