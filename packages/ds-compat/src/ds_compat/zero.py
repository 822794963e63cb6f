"""`deepspeed.zero`: construction without memory, whole parameters for a while, memory estimates, leaf modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

import ds_layers
import ds_zero
from ds_compat.params import present


class Init:
    """Modules constructed inside have parameters that no rank holds whole: `ds_zero.deferred_init`.

    Their values are those of ordinary construction; `deepspeed.initialize` divides them. Before that,
    `GatheredParameters` shows them, and keeps what is written.
    """

    _active = 0

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        **_: Any,
    ) -> None:
        self.enabled = enabled and _wants_stage_3(
            config_dict_or_path if config_dict_or_path is not None else config
        )
        self._modules: list[nn.Module] = []
        self._stack = contextlib.ExitStack()
        if self.enabled:
            from ds_compat.comm import init_distributed

            init_distributed()  # as the original does, so that ranks are known from here on
            if module is not None:  # an existing model: initialize divides it
                present(module.parameters())

    def __enter__(self) -> Init:
        if self.enabled:
            type(self)._active += 1
            if type(self)._active == 1:
                self._stack.enter_context(_deferred())
        return self

    def __exit__(self, *error: Any) -> None:
        if self.enabled:
            type(self)._active -= 1
            self._stack.__exit__(*error)


def _wants_stage_3(config: Any) -> bool:
    """False for a configuration of another stage: nothing would be divided there."""
    if not isinstance(config, dict):
        return True
    section = config.get("zero_optimization", {})
    return not isinstance(section, dict) or section.get("stage", 3) == 3


@contextlib.contextmanager
def _deferred() -> Iterator[None]:
    found: dict[int, nn.Parameter] = {}

    def note(_: nn.Module, __: str, param: Any) -> None:
        if isinstance(param, nn.Parameter):
            found[id(param)] = param

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(note)
    try:
        with ds_zero.deferred_init(stage=3, defer_buffers=False):
            yield
    finally:
        handle.remove()
        present(p for p in found.values() if ds_zero.presence(p) is not None)


def shutdown_init_context() -> None:
    """Nothing stays active outside the context here."""


def restore_init_context() -> None:
    """Nothing stays active outside the context here."""


class GatheredParameters:
    """Whole parameters inside, on all ranks; with `modifier_rank`, that rank's values stay.

    Parameters that are not divided are left alone. What is written without `modifier_rank` raises at the end,
    instead of being lost.
    """

    def __init__(
        self, params: Any, modifier_rank: int | None = None, fwd_module: Any = None, enabled: bool = True
    ) -> None:
        given = [params] if isinstance(params, torch.Tensor) else list(params or ())
        unique = {id(p): p for p in given if isinstance(p, nn.Parameter) and ds_zero.presence(p) is not None}
        self.params = list(unique.values()) if enabled else []
        self.src_rank = modifier_rank
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self.params:
            write = self.src_rank is not None
            self._stack.enter_context(
                ds_zero.gathered(self.params, write=write, writer_rank=self.src_rank or 0)
            )

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Checks its arguments: ds_zero finds parameters that are read outside their module by itself.

    Raises:
        RuntimeError: `parameter` is no Parameter.
    """
    if not isinstance(parameter, nn.Parameter):
        raise RuntimeError("a torch.nn.Parameter is needed")


unregister_external_parameter = register_external_parameter


@contextlib.contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """The module with all its parameters gathered, so that generating does not gather in every step. Collective."""
    module = getattr(model, "module", model)
    with GatheredParameters(list(module.parameters())):
        yield module


class TiledLinear(ds_layers.TiledLinear):
    """See `ds_layers.TiledLinear`; takes values from layers that are divided, too."""

    @torch.no_grad()
    def copy_params_from(self, other: nn.Linear) -> None:
        with GatheredParameters([*self.parameters(), *other.parameters()], modifier_rank=0):
            super().copy_params_from(other)


class TiledLinearReturnBias(TiledLinear):
    """As TiledLinear, for layers that return their bias beside the product."""

    def forward(self, input: Any) -> Any:
        return nn.functional.linear(self.whole(input), self.weight), self.bias


# --- leaf modules


def _matching(model: nn.Module, matches: Callable[[str, nn.Module], bool]) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if matches(name, module)]


def _mark(found: list[nn.Module], wanted: Any, flag: bool, raise_if_not_found: bool) -> list[nn.Module]:
    if not found and raise_if_not_found:
        raise ValueError(f"No modules of {wanted} found in the model.")
    for module in found:
        module._z3_leaf = flag  # type: ignore[assignment]
    return found


def _is_of(module: nn.Module, classes: Iterable[Any]) -> bool:
    for kind in classes:
        if isinstance(kind, str):
            own = type(module)
            if kind in (own.__name__, f"{own.__module__}.{own.__qualname__}"):
                return True
        elif isinstance(module, kind):
            return True
    return False


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Modules whose parameters are gathered as one, with all inside, in a model that is not sharded yet."""
    classes = list(leaf_module_classes)
    return _mark(_matching(model, lambda _, m: _is_of(m, classes)), classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    classes = list(leaf_module_classes)
    return _mark(_matching(model, lambda _, m: _is_of(m, classes)), classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """By full names; returns the modules, and the names that were not found."""
    wanted = list(module_names)
    named = dict(model.named_modules())
    found = _mark([named[n] for n in wanted if n in named], wanted, True, raise_if_not_found)
    return found, [n for n in wanted if n not in named]


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """By the last part of their names."""
    wanted = list(module_name_suffixes)
    named = [(name, module) for name, module in model.named_modules()]
    found = [m for name, m in named if any(name == s or name.endswith("." + s) for s in wanted)]
    missing = [s for s in wanted if not any(name == s or name.endswith("." + s) for name, _ in named)]
    return _mark(found, wanted, True, raise_if_not_found), missing


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    _mark([model], model, flag, True)


def z3_leaf_module(model: nn.Module) -> bool:
    return bool(getattr(model, "_z3_leaf", False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    return _matching(model, lambda _, module: z3_leaf_module(module))


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    return False
