"""Names of a model's parameters and buffers, without the prefixes of wrappers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Prefixes that torch.compile and activation checkpointing add to names.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the module inside of DistributedDataParallel, whose names do not begin with "module."."""
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def clean(name: str) -> str:
    """Removes the prefixes of wrappers from a name."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns every parameter under its first name."""
    return {clean(name): p for name, p in unwrapped(model).named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns every persistent buffer."""
    inner = unwrapped(model)
    # The hooks of state_dict make FSDP2 reshard gathered parameters.
    persistent = inner.state_dict(keep_vars=True).keys()
    return {clean(name): b for name, b in inner.named_buffers() if name in persistent}


def tied(model: nn.Module) -> dict[str, str]:
    """Returns every further name of a shared parameter -> its first name, under which it is stored."""
    first = {id(p): name for name, p in parameters(model).items()}
    every = unwrapped(model).named_parameters(remove_duplicate=False)
    return {clean(name): first[id(p)] for name, p in every if clean(name) != first[id(p)]}


def of_optimizer(model: nn.Module, groups: list[dict[str, object]]) -> dict[int, str]:
    """Returns the id of each parameter in the groups -> its name.

    Raises:
        ValueError: a group has a parameter that is not in the model.
    """
    names = {id(p): name for name, p in parameters(model).items()}
    for number, group in enumerate(groups):
        params = group["params"]
        assert isinstance(params, list)
        for index, param in enumerate(params):
            if id(param) not in names:
                raise ValueError(
                    f"optimizer.param_groups[{number}]['params'][{index}], of shape {tuple(param.shape)}, is not "
                    "a parameter of this model: pass the optimizer of this model (an optimizer that was created "
                    "before the model was sharded or moved has other parameters)"
                )
    return names
