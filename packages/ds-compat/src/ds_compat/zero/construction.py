"""`deepspeed.zero`: construction without memory, whole parameters for a while, memory estimates, leaf modules."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import ds_layers
import ds_zero
from ds_compat.zero.params import present


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
            from ds_compat.comm.collectives import init_distributed

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
        try:
            self._stack.__exit__(*error)
        except ValueError as found:
            raise LostWriteError(f"in-place modification of parameters of stage 3: {found}") from found


class LostWriteError(ValueError, RuntimeError):
    """Gathered for reading, and written; the original raises RuntimeError where sanity checks are on."""


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
