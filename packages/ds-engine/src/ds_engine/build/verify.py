"""`verify`: trains a configuration with the engine and with plain PyTorch, and compares them step by step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

import ds_zero
from ds_core.kernels import squared_norm
from ds_engine.assemble import initialize
from ds_engine.build import pipeline, ranks
from ds_engine.build.optimizer import optimizer_of
from ds_engine.build.pipeline import verify as stages
from ds_engine.build.schedule import schedule_of
from ds_engine.build.zero import loss_scale_of, zero_config
from ds_engine.config import DsConfig
from ds_engine.config.support.batch import Batch
from ds_engine.engine import Engine
from ds_engine.job import Job
from ds_engine.pipeline_engine import PipelineEngine
from ds_engine.training.pacing import Pacing
from ds_zero.predict.remedies import batch_size
from ds_zero.prove.lockstep import Batches, Candidate, ModelPerRank
from ds_zero.prove.reference_training import Recipe, own_randomness, seed_everything
from ds_zero.prove.verify import default_model_loss, run

Factory = Callable[[], Any]


def verify(
    settings: DsConfig,
    factory: Factory,
    batches: Batches | Dataset[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    *,
    steps: int = 3,
    optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
    lr_scheduler: Callable[[Optimizer], Any] | None = None,
    bitwise: bool = False,
    seed: int = 0,
) -> ds_zero.Verification:
    """Trains `steps` steps with an engine and in plain PyTorch, and reports the first difference. Collective.
    `ds_zero.verify` describes what is compared and which differences are allowed.

    Args:
        factory: returns the model, or the model and example inputs of one forward (as for `ds plan`). After the same
            `torch.manual_seed` it must return the same values. For a `ds_pipe.model.PipelineModule`, the inputs are a
            pair (inputs, labels), and so is each micro-batch.
        batches: micro-batches, as for `ds_zero.verify`; or a data set, whose samples are collated. None: generated
            from the example inputs: normally distributed numbers for floating-point inputs, shuffled elements for
            others.
        loss: a function of the engine and a micro-batch that returns a scalar. Default: the output of the model for
            the micro-batch. Not for pipelines, which have one.
        optimizer: makes the optimizer, if the configuration has none.
        lr_scheduler: makes the schedule, if the configuration has none.
        bitwise: accept only bitwise equality.
        seed: seed of weights and random numbers.

    Raises:
        ConfigError: a mistake in the configuration.
        ValueError: an invalid factory, micro-batches or settings.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: give 1 or more")
    with own_randomness():
        world = ranks.start()
        seed_everything(seed)
        model, inputs = _made(factory)
        piped = pipeline.choice_of(model) is not None
        if piped:
            stages.check(model, loss)
        engine, *_ = initialize(model, _quiet(settings), optimizer=optimizer, lr_scheduler=lr_scheduler)
        with engine:
            job = engine.job
            stream = _batches(batches, inputs, job.batch)

            def make() -> tuple[nn.Module, Optimizer]:
                with stages.undivided() if piped else nullcontext():
                    plain, _ = _made(factory)
                plain.to(world.device)
                return plain, optimizer_of(job, optimizer, plain)

            on_host = job.placement.optimizer_on_host
            recipe = Recipe(
                make=make,
                loss=loss or default_model_loss,
                config=lambda module: zero_config(job, module),
                stage=job.stage,
                ranks=world.world_size,
                micro_batches=job.batch.steps,
                clip=job.clipping,
                scale=loss_scale_of(job.precision.loss_scaling),
                schedule=lambda built: schedule_of(job, lr_scheduler, built),
                norms=squared_norm,
                dress=lambda module, done: _Plain(module, job, Pacing(settings), done),
                finish=job.precision.cast_buffers,
                masters=torch.device("cpu") if on_host and world.device.type != "cpu" else None,
                seed=seed,
            )
            trained: Candidate
            if isinstance(engine, PipelineEngine):
                trained = stages.Trained(engine, stages.adapted(recipe, job))
            else:
                trained = _Trained(engine, recipe)
            what = f"{type(model).__name__} by this configuration ({_words(job)})"
            return run(trained, trained.recipe, stream, steps=steps, bitwise=bitwise, made=model, what=what)


class _Trained(ModelPerRank):
    """An engine as the training to verify."""

    def __init__(self, engine: Engine, recipe: Recipe) -> None:
        self._engine = engine
        self.model, self.recipe = engine.module, recipe

    def micro_batch(self, batch: Any) -> float:
        loss = self.recipe.loss(self._engine, batch)
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        return loss.item()

    def step(self) -> None:
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        self.norm = math.nan if norm is None else norm


class _Plain:
    """The argument of the loss function in the plain training: a model that casts its inputs as the engine does."""

    def __init__(
        self,
        module: nn.Module,
        job: Job,
        pacing: Pacing,
        steps: Callable[[], int],
    ) -> None:
        self.module = module
        self._precision, self._device_type = job.precision, job.device_type
        self._pacing, self._steps = pacing, steps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.module.training:
            kwargs |= self._pacing.arguments(self._steps())
        with self._precision.around_forward(self._device_type):
            return self.module(*self._precision.cast(args), **self._precision.cast(kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def _made(factory: Factory) -> tuple[nn.Module, Any]:
    """Returns the model and the inputs of the factory.

    Raises:
        ValueError: the factory returned no model.
    """
    made = factory()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the factory returned a {type(model).__name__}: it must return a model, or (model, inputs)"
        )
    return model, inputs


def _batches(given: Batches | Dataset[Any] | None, inputs: Any, batch: Batch) -> Batches:
    if isinstance(given, Dataset):
        return DataLoader(given, batch_size=batch.micro, drop_last=True)
    if given is not None:
        return given
    if inputs is None:
        raise ValueError(
            "there are no micro-batches: pass a function that makes them (--batches), or let the factory return "
            "(model, inputs)"
        )
    size = batch_size(inputs)
    if size == 0:
        raise ValueError(
            "the first dimensions of the example inputs differ, so micro-batches cannot be generated from them: "
            "pass a function that makes them (--batches)"
        )
    return (_like(inputs, batch.micro, number) for number in itertools.count())


def _like(inputs: Any, size: int, number: int) -> Any:
    """Returns inputs of the same shapes, except for the first dimension."""
    generator = torch.Generator().manual_seed(number)

    def one(example: Tensor) -> Tensor:
        shape = (size, *example.shape[1:])
        if example.is_floating_point():
            return torch.randn(shape, generator=generator).to(example.dtype)
        flat = example.detach().cpu().reshape(-1)
        chosen = torch.randint(flat.numel(), (math.prod(shape),), generator=generator)
        return flat[chosen].view(shape)

    return tree_map_only(Tensor, one, inputs)


def _quiet(settings: DsConfig) -> DsConfig:
    """Returns the same settings without output, since this is a test and not a run."""
    nothing = {
        name: type(getattr(settings, name))() for name in ("csv_monitor", "tensorboard", "wandb", "comet")
    }
    off = dict.fromkeys(("startup_summary", "wall_clock_breakdown", "memory_breakdown", "dump_state"), False)
    return settings.model_copy(update={**nothing, **off, "steps_per_print": None})


def _words(job: Job) -> str:
    batch, stages = job.batch, job.pipeline
    ranks_of = f"{batch.ranks} rank{'s' * (batch.ranks != 1)}"
    if stages is not None:
        ranks_of += f" for each pipeline rank, {len(stages.rank_of_stage)} pipeline stages"
    return (
        f"stage {job.stage}, {ranks_of}, micro-batches of {batch.micro} x "
        f"{batch.steps} a step; {job.precision}{'; optimizer on the host' if job.placement.optimizer_on_host else ''}"
    )
