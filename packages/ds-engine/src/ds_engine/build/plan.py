"""`ds plan`: what a configuration and a model will hold and send, on any number of ranks, computed here."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ds_zero
from ds_engine.build import optimizer as optimizer_section
from ds_engine.build import zero as zero_section
from ds_engine.build.precision import Precision
from ds_engine.config import DsConfig
from ds_zero.predict.remedies import with_batch_size


def load_factory(where: str) -> Callable[[], Any]:
    """The function that `package.module:function` or `file.py:function` names.

    Raises:
        ValueError: there is none.
    """
    place, colon, name = where.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"{where!r}: write package.module:function or file.py:function")
    if place.endswith(".py"):
        file = Path(place).resolve()
        if not file.is_file():
            raise ValueError(f"{where!r}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(file.stem, module)  # dataclasses and pickle look there
        sys.path.insert(0, str(file.parent))  # as if it were run
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"{where!r}: there is no module {error.name}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"{where!r}: {place} has no function {name}")
    made: Callable[[], Any] = found
    return made


def plan(
    settings: DsConfig,
    factory: Callable[[], Any],
    *,
    ranks: int,
    micro_batch: int | None = None,
    checkpointing: bool = False,
    device: str | None = None,
    budget_bytes: int | None = None,
    host_budget_bytes: int | None = None,
) -> ds_zero.Plan:
    """What one of `ranks` ranks will hold and send under a configuration.

    Args:
        factory: makes the model, or the model and example inputs of one forward (a tensor, a tuple, or a mapping of
            keywords). It is called on the meta device, so nothing of the model is held.
        micro_batch: samples of one forward, in place of those of the example inputs; default: the configuration's.
        checkpointing: recompute activations of every block.

    Raises:
        ConfigError: batch sizes that contradict each other on so many ranks.
        ValueError: a model that cannot be planned.
    """
    batch = settings.batch(ranks)
    with torch.device("meta"):
        made = factory()
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the factory returned a {type(model).__name__}: it has to return a model, or (model, inputs)"
        )
    if inputs is not None:
        inputs = with_batch_size(inputs, micro_batch or batch.micro)
    kind = device or _default_device()
    precision = Precision.of(settings, kind)
    on_host = settings.zero_optimization.offload_optimizer.device == "cpu"
    group = settings.zero_optimization.mics_shard_size
    return ds_zero.plan(
        model,
        inputs,
        stage=settings.zero_optimization.stage,
        ranks=ranks,
        optimizer=_optimizer(settings, on_host),
        accumulation_steps=batch.steps,
        config=zero_section.zero_config(settings, batch, precision.zero_options(model), model),
        shard_ranks=group if group > 0 else None,
        loss_scale=precision.loss_scale is not None,
        offload=on_host,
        checkpointing=checkpointing,
        clip=math.isfinite(settings.gradient_clipping) and settings.gradient_clipping > 0,
        device=kind,
        budget_bytes=budget_bytes,
        host_budget_bytes=host_budget_bytes,
    )


def _optimizer(settings: DsConfig, on_host: bool) -> Callable[[Any], torch.optim.Optimizer] | None:
    section = settings.optimizer
    if section is None:
        return None
    return lambda parameters: optimizer_section.build(
        section.type, section.params, list(parameters), on_host=on_host
    )


def _default_device() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found is not None else "cpu"
