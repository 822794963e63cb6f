"""`deepspeed.zero.Init` and `GatheredParameters`: sharded construction, and gathering of parameters in a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import ds_zero
from ds_compat.config.deepspeed_config import read
from ds_compat.device import training_device
from ds_compat.zero.params import present


class Init:
    """Context manager in which modules are constructed with sharded parameters, by `ds_zero.divided_init`.

    Their values are those of ordinary construction on rank 0. `deepspeed.initialize` moves them into buckets. Before
    that, they can be read and written in `GatheredParameters`.

    Args:
        module: a model that is constructed already; `deepspeed.initialize` shards it.
        config_dict_or_path, config: the context has no effect if the stage in it is not 3.
        enabled: False disables the context.
    """

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
        if self.enabled:
            from ds_compat.comm.collectives import init_distributed

            init_distributed()  # as DeepSpeed does, so that code can use the process group afterwards
            if module is not None:
                present(module.parameters())

    def __enter__(self) -> Init:
        if self.enabled:
            _construction.enter()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self.enabled:
            _construction.leave(kind, *error)


def _wants_stage_3(config: Any) -> bool:
    """Whether the configuration has stage 3, or no stage."""
    if config is None:
        return True
    section = getattr(config, "raw", None) or read(config)
    section = section.get("zero_optimization", {})
    return not isinstance(section, dict) or section.get("stage", 3) == 3


class _Construction:
    """The construction context that nested `Init` contexts of this process share."""

    def __init__(self) -> None:
        self._depth = 0
        self._context: contextlib.ExitStack | None = None

    def enter(self) -> None:
        self._depth += 1
        self.resume()

    def leave(self, *error: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.pause(*error)

    def resume(self) -> None:
        """Shards modules that are constructed from now on, if an `Init` context is open."""
        if self._depth and self._context is None:
            self._context = contextlib.ExitStack()
            self._context.enter_context(_divided())

    def pause(self, *error: Any) -> None:
        """Shards all parameters that were constructed, and stops sharding later ones. Collective."""
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(*(error or (None, None, None)))


_construction = _Construction()
"""Global, because DeepSpeed's functions have no object that could hold it."""


@contextlib.contextmanager
def _divided() -> Iterator[None]:
    def note(_: nn.Module, __: str, param: Any) -> None:
        if isinstance(param, nn.Parameter) and ds_zero.presence(param) is not None:
            present([param])

    with ds_zero.divided_init(device=training_device()):
        handle = torch.nn.modules.module.register_module_parameter_registration_hook(note)
        try:
            yield
        finally:
            handle.remove()


def shutdown_init_context() -> None:
    """From now on constructs modules without sharding, despite open `Init` contexts. Collective."""
    _construction.pause()


def restore_init_context() -> None:
    """Undoes `shutdown_init_context`."""
    _construction.resume()


@contextlib.contextmanager
def outside_init() -> Iterator[None]:
    """Context manager in which open `Init` contexts have no effect."""
    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


class GatheredParameters:
    """Context manager in which parameters are gathered on all ranks; with `modifier_rank`, that rank's changes are
    kept.

    Parameters that are not sharded are ignored. A write without `modifier_rank` raises at the end of the context,
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
        except ValueError as error_of_context:
            raise LostWriteError(
                f"in-place modification of parameters of stage 3: {error_of_context}"
            ) from error_of_context


class LostWriteError(ValueError, RuntimeError):
    """A parameter that was gathered for reading was written. DeepSpeed raises RuntimeError for it if sanity checks
    are enabled.
    """


def register_external_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Only checks its arguments: ds_zero detects parameters that are read outside of their module automatically.

    Raises:
        RuntimeError: `parameter` is not a Parameter.
    """
    if not isinstance(parameter, nn.Parameter):
        raise RuntimeError(f"expected a torch.nn.Parameter, got {type(parameter).__name__}")


unregister_external_parameter = register_external_parameter


@contextlib.contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """Context manager that gathers all parameters, so that generation does not gather in every step. Collective."""
    module = getattr(model, "module", model)
    with GatheredParameters(list(module.parameters())):
        yield module
