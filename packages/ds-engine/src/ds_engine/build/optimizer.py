"""Builds an optimizer over a model's parameters from the section `optimizer`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import ds_core.optim
from ds_engine.build.local_sgd import with_outer_step
from ds_engine.build.optimizers import compressed, mup
from ds_engine.config.support.errors import ConfigError
from ds_engine.config.support.suggest import did_you_mean
from ds_engine.interfaces import MakeOptimizer
from ds_engine.job.choices import Choices, OptimizerChoice
from ds_engine.launch.machine import core_numbers


@dataclass(frozen=True, kw_only=True)
class Own:
    """One of our optimizers, by its name in the configuration."""

    class_name: str
    """Name of the class in ds_core.optim, or, with `communicates`, in ds_comm.optim."""
    communicates: bool = False
    """Whether the optimizer reduces gradients by itself."""
    host_class_name: str | None = None
    """Name of the class in ds_offload, for offload_optimizer.device "cpu" and "nvme"."""
    accepts: tuple[str, ...]
    renames: Mapping[str, str] = field(default_factory=dict)
    """Key in the configuration -> argument of the class."""
    host_renames: Mapping[str, str] | None = None
    """The same for the class in ds_offload; None: as `renames`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Key in the configuration -> DeepSpeed's default, if that of the class differs."""
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    """Key that DeepSpeed has and the class lacks -> accepted values without effect, and the remedy for other values."""
    host_accepts: tuple[str, ...] = ()
    """Arguments that only the class in ds_offload has."""


FORMATS = ("state_dtype", "split_masters")
"""Arguments of the element-wise optimizers of ds_offload: the formats of what they keep."""
_ANY_GRAD = ((True, False), "remove it")
_FP32_STATES = ((True, None), "remove it: states are kept in fp32")
_ADAM = Own(
    class_name="FusedAdam",
    host_class_name="CPUAdam",
    accepts=("lr", "betas", "eps", "weight_decay", "adam_w_mode", "bias_correction"),
    renames={"adam_w_mode": "decoupled"},
    host_renames={"adam_w_mode": "adamw_mode"},
    only={
        "torch_adam": ((False,), ""),
        "amsgrad": ((False,), 'set it to false, or "torch_adam" to true'),
        "set_grad_none": _ANY_GRAD,
        "fp32_optimizer_states": _FP32_STATES,
    },
    host_accepts=FORMATS,
)


def _mu_adam(*, decoupled: bool) -> Own:
    return Own(
        class_name="FusedAdam",
        host_class_name="CPUAdam",
        accepts=("lr", "betas", "eps", "weight_decay", "bias_correction", "decoupled_wd"),
        renames={"adam_w_mode": "decoupled"},
        host_renames={"adam_w_mode": "adamw_mode"},
        defaults={"adam_w_mode": decoupled},
        only={"amsgrad": ((False,), "set it to false")},
        host_accepts=FORMATS,
    )


def _communicating(class_name: str, *arguments: str) -> Own:
    return Own(
        class_name=class_name,
        communicates=True,
        accepts=(
            *("lr", "betas", "eps", "weight_decay", "bias_correction"),
            *arguments,
            *compressed.ACCEPTED,
        ),
        only={
            "eps_inside_sqrt": ((False,), "set it to false"),
            "amsgrad": ((False,), "set it to false"),
        },
    )


_LAMB = (
    "freeze_step",
    "max_coeff",
    "min_coeff",
    "coeff_beta",
    "factor_max",
    "factor_min",
    "factor_threshold",
)

OWN: Mapping[str, Own] = {
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adagrad": Own(
        class_name="FusedAdagrad",
        host_class_name="CPUAdagrad",
        accepts=("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
        only={"amsgrad": ((False,), "set it to false"), "fp32_optimizer_states": _FP32_STATES},
        host_accepts=FORMATS,
    ),
    "Lamb": Own(
        class_name="FusedLamb",
        host_class_name="CPULamb",
        accepts=("lr", "betas", "eps", "weight_decay", "max_coeff", "min_coeff", "bias_correction"),
        renames={"max_coeff": "max_ratio", "min_coeff": "min_ratio"},
        defaults={"eps": 1e-8, "max_coeff": 10.0, "min_coeff": 0.01},
        only={
            "eps_inside_sqrt": ((False,), "set it to false"),
            "amsgrad": ((False,), "set it to false"),
        },
    ),
    "Lion": Own(
        class_name="FusedLion",
        host_class_name="CPULion",
        accepts=("lr", "betas", "weight_decay"),
        defaults={"lr": 1e-3, "betas": (0.9, 0.999)},
        only={"set_grad_none": _ANY_GRAD, "fp32_optimizer_states": _FP32_STATES},
        host_accepts=FORMATS,
    ),
    "Muon": Own(
        class_name="Muon",
        host_class_name="CPUMuon",
        accepts=(
            "lr",
            "muon_lr",
            "adam_lr",
            "weight_decay",
            "momentum",
            "betas",
            "eps",
            "nesterov",
            "ns_steps",
        ),
        renames={"muon_lr": "lr"},
        defaults={"weight_decay": 0.0},
        only={
            "ns_method": (("gram", "standard"), "remove it"),
            "adam_w_mode": ((True,), "remove it: vectors decay as in AdamW"),
            "torch_adam": ((False,), "remove it"),
            "per_head_muon": ((False,), "remove it: each matrix is orthogonalised as a whole"),
            "fp32_optimizer_states": _FP32_STATES,
        },
    ),
    "SGD": Own(
        class_name="FusedSGD",
        host_class_name="CPUSGD",
        accepts=("lr", "momentum", "dampening", "weight_decay", "nesterov"),
        host_accepts=FORMATS,
    ),
    "OneBitAdam": _communicating("OneBitAdam", "freeze_step"),
    "ShardedOneBitAdam": _communicating("ShardedOneBitAdam", "freeze_step"),
    "ZeroOneAdam": _communicating(
        "ZeroOneAdam",
        "var_freeze_step",
        "var_update_scaler",
        "local_step_scaler",
        "local_step_clipper",
    ),
    "OneBitLamb": _communicating("OneBitLamb", *_LAMB),
    "ShardedOneBitLamb": _communicating("ShardedOneBitLamb", *_LAMB),
    "MuAdam": _mu_adam(decoupled=False),
    "MuAdamW": _mu_adam(decoupled=True),
    "MuSGD": Own(
        class_name="FusedSGD",
        host_class_name="CPUSGD",
        accepts=("lr", "momentum", "dampening", "weight_decay", "nesterov", "decoupled_wd"),
        host_accepts=FORMATS,
    ),
}
"""Names of our optimizers. If ours does not support the settings, torch's class of the same name is used."""


@dataclass(frozen=True, kw_only=True)
class Meant:
    """The class that a name and its settings select, and the arguments for it."""

    make: Any
    accepts: tuple[str, ...]
    arguments: Mapping[str, Any]
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    communicates: bool = False
    """Whether it takes an argument `group`, the ranks over which it reduces gradients."""


def choose(choice: OptimizerChoice) -> Meant:
    """Returns the class and arguments that `build` will use.

    Raises:
        ConfigError: there is no such optimizer.
    """
    name, params, on_host = choice.name, choice.params, choice.on_host
    own = next((entry for key, entry in OWN.items() if key.lower() == name.lower()), None)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    if own is _ADAM and values.get("torch_adam") is True:
        decoupled = name.lower() == "adamw" or values.get("adam_w_mode", True)
        rest = {k: v for k, v in values.items() if k not in ("torch_adam", "adam_w_mode")}
        return _torch_choice(torch.optim.AdamW if decoupled else torch.optim.Adam, rest)
    kernels = _own_class(own, on_host) if own is not None else None
    # torch's class of the same name is used for options that ours lacks, such as foreach or maximize.
    if own is None or kernels is None or (own is not _ADAM and _torch_serves(name, own, values)):
        return _torch_choice(_torch_class(name), values)
    renames = own.host_renames if on_host and own.host_renames is not None else own.renames
    if own.class_name == "Muon":
        values = _muon_rates(values)
    arguments = {
        renames.get(key, key): value
        for key, value in {**own.defaults, **values}.items()
        if key not in own.only
    }
    return Meant(
        make=kernels,
        accepts=(*own.accepts, *own.host_accepts),
        arguments=arguments,
        only=own.only,
        communicates=own.communicates,
    )


def _muon_rates(values: Mapping[str, Any]) -> dict[str, Any]:
    """Applies `lr` to matrices and to other parameters, unless they have a rate of their own; without `lr`,
    DeepSpeed's defaults.
    """
    rest = {key: value for key, value in values.items() if key not in ("lr", "muon_lr", "adam_lr")}
    return {
        **rest,
        "muon_lr": values.get("muon_lr", values.get("lr", 0.02)),
        "adam_lr": values.get("adam_lr", values.get("lr", 3e-4)),
    }


def check(choice: OptimizerChoice) -> list[str]:
    """Yields mistakes in a section `optimizer`, before there are parameters."""
    name, params = choice.name, choice.params
    try:
        meant = choose(choice)
    except ConfigError as error:
        return list(error.problems)
    wrong = []
    for key, value in params.items():
        quiet, remedy = meant.only.get(key, (None, ""))
        if quiet is not None:
            if not any(value is q for q in quiet):
                wrong.append(
                    f"optimizer.params.{key} is {value!r}: our {name} does not support this value; {remedy}"
                )
        elif key not in meant.accepts and not (
            key in ("torch_adam", "adam_w_mode") and params.get("torch_adam")
        ):
            hint = did_you_mean(key, meant.accepts)
            wrong.append(f"optimizer.params.{key}: {name} has no such argument.{hint}")
    able = getattr(meant.make, "formats", ())
    if able and params.get("state_dtype", able[0]) not in able:
        wrong.append(
            f"optimizer.params.state_dtype is {params['state_dtype']!r}: {name} keeps its states in "
            f"{' or '.join(repr(kind) for kind in able)}"
        )
    if name.lower() == "adamw" and params.get("adam_w_mode") is False:
        wrong.append(
            "optimizer.params.adam_w_mode is False, but AdamW always decouples weight decay: set optimizer.type "
            'to "Adam"'
        )
    return wrong


def optimizer_of(
    choices: Choices,
    given: Optimizer | MakeOptimizer | None,
    model: nn.Module,
    parameters: Any = None,
    group: dist.ProcessGroup | None = None,
) -> Optimizer:
    """Returns the optimizer of a job over `model`: the passed one, or the one that the configuration names.

    Args:
        given: the argument of `initialize`.
        parameters: parameters or groups for the optimizer; None: all that require a gradient.
        group: the ranks with the same parameters, for an optimizer that reduces gradients by itself; None: all.

    Raises:
        ConfigError: there is none, or the configured one cannot be built.
    """
    inner = _inner(choices, given, model, parameters, group)
    return with_outer_step(choices.settings.local_sgd, inner, group)


def _inner(
    choices: Choices,
    given: Optimizer | MakeOptimizer | None,
    model: nn.Module,
    parameters: Any,
    group: dist.ProcessGroup | None,
) -> Optimizer:
    if isinstance(given, Optimizer):
        return given
    items = trained(model) if parameters is None else list(parameters)
    if given is not None:
        return given(items)
    if choices.optimizer is None:
        raise ConfigError(
            [
                'no optimizer: add a section such as "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, or '
                "pass optimizer="
            ]
        )
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build(choices.optimizer, items, names, group)
    share = choices.settings.zero_optimization.offload_optimizer.cpuadam_cores_perc
    if share is not None and hasattr(optimizer, "cores"):
        optimizer.cores = _last_cores(share)
    return optimizer


def _last_cores(share: float) -> list[int]:
    """Returns this fraction of the cores of the process, at least one."""
    cores = core_numbers()
    return cores[-max(1, math.ceil(share * len(cores))) :]


def maker_of(choices: Choices, model: nn.Module) -> MakeOptimizer | None:
    """Returns a function that builds the configured optimizer over copies of the model's parameters, in order, for a
    plan. None: the configuration names no optimizer.
    """
    choice = choices.optimizer
    if choice is None or choice.passed:
        return None
    names = [name for name, p in model.named_parameters() if p.requires_grad]

    def make(parameters: Any) -> Optimizer:
        copies = list(parameters)
        inner = build(choice, copies, {id(p): name for name, p in zip(names, copies, strict=True)})
        return with_outer_step(choices.settings.local_sgd, inner)

    return make


def communicates(choice: OptimizerChoice | None) -> bool:
    """Whether the configuration names an optimizer that averages gradients inside of its step."""
    if choice is None or choice.passed:
        return False
    return any(own.communicates for name, own in OWN.items() if name.lower() == choice.name.lower())


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that require a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def build(
    choice: OptimizerChoice,
    parameters: Iterable[Any],
    names: Mapping[int, str],
    group: dist.ProcessGroup | None = None,
) -> Optimizer:
    """Builds the optimizer that the configuration names.

    Args:
        parameters: tensors or groups, as for any torch optimizer.
        names: id of a parameter -> its name, by which Muon recognises embeddings and heads, which AdamW updates.

    Raises:
        ConfigError: there is no such optimizer, it does not have an argument or refuses a value, or `state_dtype` is
            set for an optimizer of torch, whose states have the dtype of the parameters.
    """
    name = choice.name
    wrong = check(choice)
    if wrong:
        raise ConfigError(wrong)
    meant = choose(choice)
    arguments = dict(meant.arguments)
    if meant.communicates:
        arguments["group"] = group
    if choice.state_dtype is not None:
        if "state_dtype" not in inspect.signature(meant.make).parameters:
            able = [
                own
                for own in OWN
                if "state_dtype" in inspect.signature(_own_class(OWN[own], False)).parameters
            ]
            owner = meant.make.__module__.partition(".")[0]
            raise ConfigError(
                [
                    f"bf16.bf16_optimizer_states: {owner}'s {name} keeps its states in the dtype of the fp32 masters; "
                    f"use one of {', '.join(able)}, or remove it"
                ]
            )
        arguments["state_dtype"] = choice.state_dtype
    if inspect.isclass(meant.make) and issubclass(meant.make, ds_core.optim.Muon):
        parameters = _muon_halves(parameters, names)
    if name.lower() in mup.NAMES:
        parameters = _mu_groups(name, meant, arguments, parameters, names)
    try:
        optimizer: Optimizer = meant.make(parameters, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError([f"optimizer.params for {name}: {error}"]) from error
    return optimizer


def _mu_groups(
    name: str,
    meant: Meant,
    arguments: dict[str, Any],
    parameters: Iterable[Any],
    names: Mapping[int, str],
) -> list[dict[str, Any]]:
    """Returns groups with muP's learning rates. Removes `decoupled_wd`, which is not an argument of the optimizer."""
    defaults = inspect.signature(meant.make).parameters
    return mup.groups(
        name,
        parameters,
        lr=arguments.get("lr", defaults["lr"].default),
        weight_decay=arguments.get("weight_decay", 0.0),
        scale_decay=not arguments.pop("decoupled_wd", False),
        names=names,
    )


def _muon_halves(parameters: Iterable[Any], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Splits each group into matrices and parameters that AdamW updates. Both parts keep the settings of the group."""
    items = list(parameters)
    loose = [item for item in items if not isinstance(item, dict)]
    groups = [item for item in items if isinstance(item, dict)] + ([{"params": loose}] if loose else [])
    halves: list[dict[str, Any]] = []
    for group in groups:
        named = [(names.get(id(p), ""), p) for p in group["params"]]
        more = {key: value for key, value in group.items() if key != "params"}
        halves += [{**half, **more} for half in ds_core.optim.muon_groups(named)]
    return halves


def _torch_choice(optimizer_class: Any, values: Mapping[str, Any]) -> Meant:
    accepted = tuple(p for p in inspect.signature(optimizer_class).parameters if p != "params")
    return Meant(make=optimizer_class, accepts=accepted, arguments=values)


def _torch_serves(name: str, own: Own, values: Mapping[str, Any]) -> bool:
    """Whether torch has a class of that name that supports the settings, while ours does not."""
    lacking = set(values) - set(own.accepts) - set(own.only) - set(own.host_accepts)
    theirs = {key.lower(): value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    torch_class = theirs.get(name.lower())
    return (
        bool(lacking)
        and torch_class is not None
        and lacking <= set(inspect.signature(torch_class).parameters)
    )


def _own_class(own: Own, on_host: bool) -> Any:
    if own.communicates:
        return compressed.maker(own.class_name)
    if on_host and own.host_class_name is not None:
        import ds_offload

        return getattr(ds_offload, own.host_class_name)
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
    """Calls `optimizer.zero_grad()` without torch's wrapper, whose first call imports torch._dynamo, which takes
    seconds.
    """
    method = type(optimizer).zero_grad
    getattr(method, "__wrapped__", method)(optimizer)
