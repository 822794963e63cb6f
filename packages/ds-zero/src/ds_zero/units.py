"""Which module gathers which parameter in stage 3."""

from __future__ import annotations

from torch import nn


def choose_units(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of the units: the modules whose forward gathers their parameters as one.

    The children of a ModuleList, ModuleDict or Sequential are units (the blocks of a transformer). Outside of
    them, the largest subtrees below the model without a unit inside are units (an embedding, a head).
    Parameters of modules that contain units belong to the module itself, which is then a unit too.
    """
    repeated = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    blocks = {
        f"{name}.{child_name}" if name else child_name: child
        for name, module in model.named_modules()
        if isinstance(module, repeated)
        for child_name, child in module.named_children()
        if not _uncalled(child) and any(True for _ in child.parameters())
    }
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


def _inside(name: str, others: dict[str, nn.Module]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in others for i in range(1, len(parts)))


def _contains(name: str, others: dict[str, nn.Module]) -> bool:
    prefix = f"{name}." if name else ""
    return any(other.startswith(prefix) for other in others)


def unit_of_params(model: nn.Module, units: dict[str, nn.Module]) -> dict[str, str]:
    """Parameter name -> name of the innermost unit that contains it."""
    owner: dict[str, str] = {}
    for fqn, _ in model.named_parameters(remove_duplicate=False):
        parts = fqn.split(".")
        for i in range(len(parts) - 1, -1, -1):
            name = ".".join(parts[:i])
            if name in units:
                owner[fqn] = name
                break
    return owner
