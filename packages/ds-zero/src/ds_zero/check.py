"""What `shard` refuses, and why."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero import _registry
from ds_zero.storage import memory_key

STAGES: Mapping[int, str] = {
    0: "nothing",
    1: "optimizer states",
    2: "optimizer states and gradients",
    3: "optimizer states, gradients and parameters",
}

TRAINABLE = (torch.float32, torch.bfloat16, torch.float16)

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
        "Lion",
    ]
)
_REFUSED: Mapping[str, str] = {
    "LBFGS": "it evaluates the loss inside step() and takes dot products over all parameters",
    "SparseAdam": "shards have dense gradients; use Adam",
    "Lamb": "its trust ratio is a norm over a whole tensor, and flat shards cut tensors",
    "FusedLamb": "its trust ratio is a norm over a whole tensor, and flat shards cut tensors",
    "Muon": "it orthogonalises whole matrices, and flat shards cut matrices",
    "Adafactor": "it factors whole matrices, and flat shards cut matrices",
}


def check_stage(stage: int) -> None:
    """Raise unless `stage` is 0, 1, 2 or 3."""
    if stage not in STAGES or isinstance(stage, bool):
        meaning = "; ".join(f"{s} shards {what}" for s, what in STAGES.items())
        raise ValueError(f"stage={stage!r}: there are stages 0 to 3 ({meaning})")


def check_model(model: nn.Module) -> None:
    """Raise for parameters that cannot be moved into buckets without changing what the model computes."""
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
                f"parameters {other[0]!r} and {fqn!r} share memory but are two Parameter objects, so "
                "sharding would untie them: "
                "assign the same Parameter object to both modules"
            )
        hooks = getattr(param, "_post_accumulate_grad_hooks", None)
        if hooks:
            raise ValueError(
                f"parameter {fqn!r} has a post-accumulate-grad hook (an optimizer in backward?): gradients "
                "are reduced after "
                "that hook would have used them. Remove it and call optimizer.step() after backward"
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    def span(t: Tensor) -> tuple[int, int]:
        begin = int(t.storage_offset()) * t.element_size()
        extent = sum((n - 1) * abs(int(s)) for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        return begin, begin + extent * t.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


def check_optimizer(optimizer: Optimizer, model: nn.Module, *, flat: bool) -> None:
    """Raise unless `optimizer` holds parameters of `model` only and, with `flat`, treats every element by
    itself.
    """
    names = {id(p): fqn for fqn, p in model.named_parameters()}
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if id(param) not in names:
                raise ValueError(
                    f"param_groups[{g}]['params'][{i}] of shape {tuple(param.shape)} is no parameter of the "
                    "model: construct the "
                    "optimizer from model.parameters() of the model you pass"
                )
            if param.dtype not in TRAINABLE:
                raise ValueError(
                    f"parameter {names[id(param)]!r} has dtype {param.dtype}, but masters are fp32: convert the "
                    f"model to one of {[str(d) for d in TRAINABLE]}, or leave the parameter out of the optimizer"
                )
    name = type(optimizer).__name__
    if name in _REFUSED and (flat or name == "LBFGS"):
        raise ValueError(f"{name} does not work on flat shards: {_REFUSED[name]}. Use AdamW, or stage 0")
    if flat and name not in _ELEMENTWISE and not getattr(type(optimizer), "elementwise", False):
        _probe(optimizer)


def _probe(optimizer: Optimizer) -> None:
    """Step a tiny matrix whole and cut in two; an element-wise optimizer gives the same numbers."""
    name = type(optimizer).__name__
    generator = torch.Generator().manual_seed(0)
    value, *grads = (torch.randn(4, 6, generator=generator) for _ in range(4))

    def run(split: Callable[[Tensor], list[Tensor]]) -> Tensor:
        params = [nn.Parameter(part.clone()) for part in split(value)]
        options = {k: copy.deepcopy(v) for k, v in optimizer.defaults.items()}
        trial = type(optimizer)(params, **options)
        for grad in grads:
            for param, part in zip(params, split(grad), strict=True):
                param.grad = part.clone()
            trial.step()
        return torch.cat([p.detach().reshape(-1) for p in params])

    try:
        whole = run(lambda t: [t])
        cut = run(lambda t: [t.reshape(-1)[:10], t.reshape(-1)[10:]])
    except Exception as error:
        raise ValueError(
            f"{name} could not be tried on a 1-D shard ({type(error).__name__}: {error}). If it treats every "
            "element by itself, set "
            "the class attribute `elementwise = True` on it; else use stage 0"
        ) from error
    if not torch.allclose(whole, cut, rtol=1e-4, atol=1e-6):
        raise ValueError(
            f"{name} gives another result when a tensor is cut in two, so it cannot work on flat shards: use "
            "an element-wise "
            "optimizer such as AdamW, or stage 0"
        )
