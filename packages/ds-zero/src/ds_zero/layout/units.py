"""Determines which module gathers which parameter at stage 3."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import nn

Leaf = type[nn.Module] | str
"""A module class, or the name of a class or of a module."""

_REPEATED = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_EXPERTS = re.compile(r"experts?(_list)?$")
_MIXTURES = re.compile(r"(SparseMoe|Moe|MoE)(Block|MLP|Mlp|MoE|Layer|FFN)?$|SparseMLP$")


def leaf_names(model: nn.Module, leaves: Sequence[Leaf]) -> set[str]:
    """Returns the names of the modules that match an entry; every entry must match one."""
    matching: set[str] = set()
    for leaf in leaves:
        names = {name for name, module in model.named_modules() if _matches(name, module, leaf)}
        if not names:
            classes = sorted({type(m).__name__ for m in model.modules()})
            raise ValueError(
                f"leaf module {leaf!r} matches no class and no module of this {type(model).__name__}: pass a "
                f"class, its name, or the name of a module; the classes are {', '.join(classes)}"
            )
        matching |= names
    return matching


def _matches(name: str, module: nn.Module, leaf: Leaf) -> bool:
    if isinstance(leaf, str):
        kind = type(module)
        return leaf in (name, kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    return isinstance(module, leaf)


def choose_leaves(
    model: nn.Module,
    leaves: Sequence[Leaf] = (),
    granularity_numel: int = 0,
    is_marked: Callable[[nn.Module], bool] = lambda module: False,
) -> set[str]:
    """Names of the modules to gather whole: those that `leaves` names, those that `is_marked` accepts, known
    mixtures of experts, and those with at most `granularity_numel` parameter elements per module inside.
    """
    names = leaf_names(model, leaves)
    for name, module in model.named_modules():
        if is_marked(module) or (name and _is_mixture(module)) or _is_fine(module, granularity_numel):
            names.add(name)
    return {name for name in names if not _inside(name, names)}


def _is_mixture(module: nn.Module) -> bool:
    """Whether the module chooses between experts that it contains."""
    for name, child in module.named_children():
        if _EXPERTS.search(name) and (
            (isinstance(child, _REPEATED) and len(child) > 1) or _MIXTURES.search(type(module).__name__)
        ):
            return True
    return False


def _is_fine(module: nn.Module, granularity_numel: int) -> bool:
    if granularity_numel <= 0:
        return False
    inside = sum(1 for _ in module.modules()) - 1
    return inside > 0 and sum(p.numel() for p in module.parameters()) <= granularity_numel * inside


def choose_units(model: nn.Module, leaves: set[str] | None = None) -> dict[str, nn.Module]:
    """Returns name -> module of the units: the modules whose parameters are gathered together, for their forward.

    Leaf modules and the children of a ModuleList, ModuleDict or Sequential are units (the blocks of a transformer).
    Outside of them, the largest submodules that contain no unit are units (an embedding, a head). A module that
    contains units and has parameters of its own is a unit for these parameters.
    """
    leaves = choose_leaves(model) if leaves is None else leaves
    modules = dict(model.named_modules())
    blocks = {
        f"{name}.{child_name}" if name else child_name: child
        for name, module in modules.items()
        if isinstance(module, _REPEATED)
        for child_name, child in module.named_children()
        if not _uncalled(child) and any(True for _ in child.parameters())
    }
    blocks |= {name: modules[name] for name in leaves}
    # A Sequential inside a block is part of the block: gathering a layer's two matrices one by one gains
    # nothing.
    blocks = {n: m for n, m in blocks.items() if not _inside(n, blocks)}
    units: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if name in blocks or (name and not _uncalled(module) and not _contains(name, blocks)):
            if any(True for _ in module.parameters()):
                units[name] = module
            return
        if not _uncalled(module) and _reads_own(module):
            units[name] = module
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return units


def _uncalled(module: nn.Module) -> bool:
    """Whether it only holds others (ModuleList, ParameterList, a bare Module): what it holds is read by the
    module around it, and its hooks never run.
    """
    return type(module).forward is nn.Module.forward


def _reads_own(module: nn.Module) -> bool:
    """Whether it has parameters that no forward but its own reads: its own, and those in uncalled
    children.
    """
    return any(True for _ in module.parameters(recurse=False)) or any(
        _uncalled(child) and _reads_own(child) for child in module.children()
    )


def _inside(name: str, others: set[str] | Mapping[str, nn.Module]) -> bool:
    if not name:
        return False
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(len(parts)))


def _contains(name: str, others: Mapping[str, nn.Module]) -> bool:
    prefix = f"{name}." if name else ""
    return any(other.startswith(prefix) for other in others)


def unit_of_params(model: nn.Module, units: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns name of a parameter -> name of the innermost unit that contains it."""
    owner: dict[str, str] = {}
    for fqn, _ in model.named_parameters(remove_duplicate=False):
        parts = fqn.split(".")
        for i in range(len(parts) - 1, -1, -1):
            name = ".".join(parts[:i])
            if name in units:
                owner[fqn] = name
                break
    return owner
