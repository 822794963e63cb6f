"""Names of a model's parameters and buffers, whatever it is wrapped in."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# What torch.compile and activation checkpointing put into names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel, the names of which have no "module." in front."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def clean(name: str) -> str:
    """A name as it is without wrappers around modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under its first name."""
    return {clean(name): p for name, p in unwrapped(model).named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Every persistent buffer."""
    inner = unwrapped(model)
    # The hooks of state_dict let FSDP2 take gathered parameters down to their shards.
    persistent = inner.state_dict(keep_vars=True).keys()
    return {clean(name): b for name, b in inner.named_buffers() if name in persistent}


def tied(model: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter -> its first one, under which it is stored."""
    first = {id(p): name for name, p in parameters(model).items()}
    every = unwrapped(model).named_parameters(remove_duplicate=False)
    return {clean(name): first[id(p)] for name, p in every if clean(name) != first[id(p)]}


def of_optimizer(model: nn.Module, groups: list[dict[str, object]]) -> dict[int, str]:
    """Id of each parameter in the groups -> its name.

    Raises:
        ValueError: a group has a parameter that is not the model's.
    """
    names = {id(p): name for name, p in parameters(model).items()}
    for number, group in enumerate(groups):
        params = group["params"]
        assert isinstance(params, list)
        for index, param in enumerate(params):
            if id(param) not in names:
                raise ValueError(
                    f"optimizer.param_groups[{number}]['params'][{index}], of shape {tuple(param.shape)}, is no "
                    "parameter of this model: pass the model and the optimizer that belong together (an optimizer made "
                    "before the model was sharded or moved holds other parameters)"
                )
    return names
