"""From the section `optimizer` to an optimizer over a model's parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ds_engine.config.errors import ConfigError
from ds_engine.config.suggest import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Own:
    """One of our optimizers under its name in the config."""

    class_name: str
    """In ds_core.optim."""
    host_class_name: str | None
    """In ds_offload, for offload_optimizer.device cpu."""
    accepts: tuple[str, ...]
    renames: Mapping[str, str]
    """Config key -> argument of the class."""
    host_renames: Mapping[str, str]


_ADAM = Own(
    class_name="FusedAdam",
    host_class_name="CPUAdam",
    accepts=("lr", "betas", "eps", "weight_decay", "adam_w_mode"),
    renames={"adam_w_mode": "decoupled"},
    host_renames={"adam_w_mode": "adamw_mode"},
)


def _plain(class_name: str, *accepts: str) -> Own:
    return Own(class_name=class_name, host_class_name=None, accepts=accepts, renames={}, host_renames={})


OWN: Mapping[str, Own] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adagrad": _plain("FusedAdagrad", "lr", "eps", "weight_decay"),
    "Lamb": _plain("FusedLamb", "lr", "betas", "eps", "weight_decay"),
    "Lion": _plain("FusedLion", "lr", "betas", "weight_decay"),
    "SGD": _plain("FusedSGD", "lr", "momentum", "dampening", "weight_decay", "nesterov"),
}
"""Names that mean our kernels where ds_core has them, and torch's class of the same name where it does
not."""


def build(name: str, params: Mapping[str, Any], parameters: Iterable[Any], *, on_host: bool) -> Optimizer:
    """The optimizer that the config names.

    Args:
        parameters: tensors or groups, as for any torch optimizer.
        on_host: use the version that runs in host memory.

    Raises:
        ConfigError: no such optimizer, an argument it does not have, or a value it refuses.
    """
    own = next((entry for key, entry in OWN.items() if key.lower() == name.lower()), None)
    found = _own_class(own, on_host) if own is not None else None
    if own is not None and found is not None:
        accepted = own.accepts
        renames = own.host_renames if on_host else own.renames
    else:
        found = _torch_class(name)
        accepted = tuple(p for p in inspect.signature(found).parameters if p != "params")
        renames = {}
    wrong = [
        f"optimizer.params.{key}: {name} has no such setting.{did_you_mean(key, accepted)}"
        for key in params
        if key not in accepted
    ]
    if wrong:
        raise ConfigError(wrong)
    arguments = {renames.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in params.items()}
    try:
        optimizer: Optimizer = found(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"optimizer.params for {name}: {error}"]) from error
    return optimizer


def _own_class(own: Own, on_host: bool) -> Any:
    if on_host and own.host_class_name is not None:
        import ds_offload

        return getattr(ds_offload, own.host_class_name)
    import ds_core.optim

    return getattr(ds_core.optim, own.class_name, None)


def _torch_class(name: str) -> Any:
    theirs = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    for key, value in theirs.items():
        if key.lower() == name.lower():
            return value
    raise ConfigError(
        [f'optimizer.type is "{name}": there is no such optimizer.{did_you_mean(name, [*OWN, *theirs])}']
    )


def zero_grad(optimizer: Optimizer) -> None:
    """`optimizer.zero_grad()`; torch wraps its own so that the first call imports torch._dynamo (seconds),
    so look inside.
    """
    method = type(optimizer).zero_grad
    getattr(method, "__wrapped__", method)(optimizer)
