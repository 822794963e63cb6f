"""Marks modules that stage 3 gathers as a whole, by class, by name, or by suffix.

The mark is an attribute of the module, as in DeepSpeed, so that copies of a model have it, too (such as the reference
model in DPO). It is set by the user's call or, for the section `leaf_module` of the configuration, by
`deepspeed.initialize`, and read before the model is sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ds_engine.build.zero import leaf_modules
from ds_engine.config.sections.zero.leaf_module import LeafModuleConfig


def _matching(model: nn.Module, matches: Callable[[str, nn.Module], bool]) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if matches(name, module)]


def _mark(modules: list[nn.Module], wanted: Any, flag: bool, raise_if_not_found: bool) -> list[nn.Module]:
    if not modules and raise_if_not_found:
        raise ValueError(f"No modules of {wanted} found in the model.")
    for module in modules:
        module._z3_leaf = flag  # type: ignore[assignment]
    return modules


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
    """Marks the modules of these classes, in a model that is not sharded yet. Returns them."""
    classes = list(leaf_module_classes)
    return _mark(_matching(model, lambda _, m: _is_of(m, classes)), classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Iterable[Any], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Removes the mark. Returns the modules."""
    classes = list(leaf_module_classes)
    return _mark(_matching(model, lambda _, m: _is_of(m, classes)), classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Marks modules by full name. Returns the modules, and the names that were not found."""
    wanted = list(module_names)
    named = dict(model.named_modules())
    modules = _mark([named[n] for n in wanted if n in named], wanted, True, raise_if_not_found)
    return modules, [n for n in wanted if n not in named]


def set_z3_leaf_modules_by_suffix(
    model: nn.Module, module_name_suffixes: Iterable[str], raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Marks modules by the last part of their names."""
    wanted = list(module_name_suffixes)
    named = [(name, module) for name, module in model.named_modules()]
    modules = [m for name, m in named if any(name == s or name.endswith("." + s) for s in wanted)]
    missing = [s for s in wanted if not any(name == s or name.endswith("." + s) for name, _ in named)]
    return _mark(modules, wanted, True, raise_if_not_found), missing


def mark_configured(model: nn.Module, section: LeafModuleConfig) -> None:
    """Marks the modules that the configuration names."""
    modules = dict(model.named_modules())
    for name in leaf_modules(section, model):
        set_z3_leaf_module(modules[name], True)


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Marks one module, or removes the mark."""
    _mark([model], model, flag, True)


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether the module is marked."""
    return bool(getattr(model, "_z3_leaf", False))


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """Returns all marked modules."""
    return _matching(model, lambda _, module: z3_leaf_module(module))


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Returns False: only modules are marked."""
    return False
