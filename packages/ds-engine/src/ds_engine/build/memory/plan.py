"""Predicts memory and messages of a configuration and a model on any number of ranks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ds_zero
from ds_engine.build.memory.model_axes import ModelAxes, connected, divided, made_on_meta
from ds_engine.build.memory.predict import Budgets, predicted
from ds_engine.build.pipeline import refuse
from ds_engine.build.topology import arranged
from ds_engine.config import DsConfig
from ds_engine.job import Job, choices_of, describe
from ds_engine.step_time import Cost, Rates, cost_of


def load_factory(where: str) -> Callable[[], Any]:
    """Returns the function that `package.module:function` or `file.py:function` names.

    Raises:
        ValueError: there is no such function.
    """
    home, colon, name = where.rpartition(":")
    if not colon or not home or not name:
        raise ValueError(f"{where!r}: write package.module:function or file.py:function")
    if home.endswith(".py"):
        file = Path(home).resolve()
        if not file.is_file():
            raise ValueError(f"{where!r}: there is no file {file}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(file.stem, module)  # dataclasses and pickle look the module up there
        sys.path.insert(0, str(file.parent))  # as if the file was run as a script
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError as error:
            raise ValueError(f"{where!r}: there is no module {error.name}") from error
    factory: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(factory):
        raise ValueError(f"{where!r}: {home} has no function {name}")
    return factory


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A job, its model on the meta device, and the inputs of one forward."""

    job: Job
    model: nn.Module
    inputs: Any
    """On the meta device, of the planned size; None if the factory gave none."""
    samples: int
    """Size of the micro-batch."""
    axes: ModelAxes
    """The groups over which the model sends messages within its layers."""
    tokens: int | None = None
    """Tokens of a sample; None if the inputs are no tokens."""

    @classmethod
    def of(
        cls,
        settings: DsConfig,
        factory: Callable[[], Any],
        *,
        ranks: int,
        micro_batch: int | None = None,
        device: str | None = None,
    ) -> Planned:
        """Describes the job and makes its model.

        Args:
            factory: makes the model, or the model and example inputs of one forward (a tensor, a tuple, or a mapping of
                keywords). It is called on the meta device, so the model takes no memory.
            ranks: number of ranks.
            micro_batch: number of samples of one forward. Default: that of the configuration.
            device: type of the training device. Default: that of this machine.

        Raises:
            ConfigError: the batch sizes contradict each other on this number of ranks.
            ValueError: the factory makes no model, or inputs of different sizes.
        """
        job = describe(choices_of(settings), arranged(settings, 0, ranks), device or _default_device())
        made = made_on_meta(factory, ranks)
        model, inputs = made if isinstance(made, tuple) else (made, None)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"the factory returned a {type(model).__name__}: it must return a model, or (model, inputs)"
            )
        refuse(model, "ds plan")
        samples = micro_batch or job.batch.micro
        if inputs is not None:
            # Prediction is not loaded where a job trains.
            from ds_zero.predict.remedies import with_batch_size

            inputs = with_batch_size(inputs, samples)
        axes = connected(settings, job, model)
        tokens = tokens_of(inputs)
        inputs = divided(inputs, job, model)
        return cls(job=job, model=model, inputs=inputs, samples=samples, axes=axes, tokens=tokens)

    @property
    def step_samples(self) -> int:
        """Samples of an optimizer step on all ranks together."""
        return self.samples * self.job.batch.steps * self.job.topology.samples.size

    def cost(self, step_s: float, rates: Rates, steps: int | None) -> Cost | None:
        """What training costs; None without a price.

        Args:
            step_s: duration of a step.
            steps: of the whole run.
        """
        return cost_of(
            step_s,
            rates,
            ranks=self.job.topology.world_size,
            samples=self.step_samples,
            tokens=self.tokens,
            steps=steps,
        )

    def memory(self, *, checkpointing: bool = False, budgets: Budgets | None = None) -> ds_zero.Plan:
        """Predicts memory and messages of one rank.

        Args:
            checkpointing: recompute activations of every block.
            budgets: default: no limits.

        Raises:
            ValueError: the model cannot be planned.
        """
        plan = predicted(
            self.job,
            self.model,
            micro_batch=self.inputs,
            checkpointing=checkpointing,
            budgets=budgets or Budgets(),
        )
        return replace(plan, notes=(*plan.notes, *self.axes.notes))


def tokens_of(inputs: Any) -> int | None:
    """Returns the number of tokens of a sample: the second size of the first tensor of whole numbers that has one."""
    for value in tree_leaves(inputs):
        if isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point():
            return int(value.shape[1])
    return None


def _default_device() -> str:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device.type if device is not None else "cpu"
