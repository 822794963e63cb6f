"""The training engine: orders precision, accumulation, clipping, optimizer, schedule and checkpoints, each
its own object.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ds_engine.build.data import Loader
from ds_engine.build.optimizer import zero_grad
from ds_engine.config.support.batch import Batch
from ds_engine.inference.generation import generate_of
from ds_engine.interfaces import BackgroundWriter, Recompute, Roles, World
from ds_engine.job import Job
from ds_engine.sampling.build import lr_scaling_of
from ds_engine.sampling.tokens import rate_factor, scaled_rates
from ds_engine.schedules import LRSchedule
from ds_engine.training import timing
from ds_engine.training.accumulation import Accumulation
from ds_engine.training.own_backwards import OwnBackwards
from ds_engine.training.pacing import Pacing
from ds_engine.training.progress import StepReport
from ds_engine.training.reporting import Reporting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Training:
    """What updates the parameters."""

    module: nn.Module
    optimizer: Optimizer
    schedule: LRSchedule | None
    """None: constant rates."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What `initialize` assembled."""

    job: Job
    world: World
    training: Training
    roles: Roles
    pacing: Pacing
    reporting: Reporting
    background: BackgroundWriter | None = None
    loader: Loader | None = None


class Engine:
    """Trains one model: `loss = engine(x)`, `engine.backward(loss)`, `engine.step()`, the last two for every
    micro-batch.

    Made by `ds_engine.initialize`. Attributes that it does not have are looked up in the module. Engines are
    independent of each other.
    """

    def __init__(self, parts: Parts) -> None:
        job = parts.job
        self.module = parts.training.module
        self.optimizer = parts.training.optimizer
        self.lr_scheduler = parts.training.schedule
        self.job = job
        """What was resolved from configuration and arguments; everything below it is what runs."""
        self.config = job.settings
        self.world = parts.world
        self.batch = job.batch
        self.precision = job.precision
        self.topology = job.topology
        """Where this rank stands among those that see other data, or hold other parts of the model."""
        self.scaler = parts.roles.guard
        self.model_state = parts.roles.state
        """What owns parameters, gradients and optimizer states."""
        self.accumulation = Accumulation(steps=job.batch.steps, managed=job.accumulating.managed)
        self.progress = parts.reporting.progress
        self.monitor = parts.reporting.monitor
        """Where curves go; `write_events` takes values of your own."""
        self.pacing = parts.pacing
        self.background = parts.background
        """What writes checkpoints beside training; None: `save_checkpoint` writes itself."""
        self.training_dataloader = parts.loader
        """What `training_data` was made into; its position is part of checkpoints."""
        self.global_steps = 0
        """Optimizer steps since the beginning of training, skipped ones included."""
        self.global_samples = 0
        """Samples that all ranks together have seen."""
        self.skipped_steps = 0
        """Steps that changed nothing because the gradient was not finite."""
        self._norms = parts.roles.norms
        self._own_backwards = OwnBackwards(parts.roles.state)
        self._reporting = parts.reporting
        self._applied = False
        self._live = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the module; floating-point tensors in the arguments are cast to the compute dtype."""
        self._refuse_if_away("forward", ("lp_params",))
        if self.module.training:
            kwargs |= self.pacing.arguments(self.global_steps)
        forward = self._reporting.part(timing.FORWARD)
        with forward, self.precision.around_forward(self.world.device.type):
            return self.module(*self.precision.cast(args), **self.precision.cast(kwargs))

    def backward(self, loss: Tensor, *, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Backward of `loss / gradient_accumulation_steps`, so that the micro-batches of a step are averaged,
        times the loss scale.

        Args:
            retain_graph: keep the graph for another backward.
            scale_wrt_gas: False: the loss is divided already.

        Returns:
            The divided loss, detached, without the loss scale.

        Raises:
            ValueError: `loss` is not one number, or does not depend on a parameter that is trained.
        """
        self._refuse_if_away("backward")
        if loss.numel() != 1:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)}: reduce it to one number, for example with loss.mean()"
            )
        if not loss.requires_grad:
            raise ValueError(
                "loss does not require a gradient: it was computed under torch.no_grad(), detached, or from "
                "frozen parameters only"
            )
        part = loss / self.accumulation.steps if scale_wrt_gas else loss
        self.accumulation.note_backward()
        with self._reporting.part(timing.BACKWARD):
            self._own_backwards.mark(self.scaler.scale(part)).backward(retain_graph=retain_graph)
        self._reporting.add_loss(part)
        return part.detach()

    def scale(self, loss: Tensor) -> Tensor:
        """What `backward` propagates: `loss / gradient_accumulation_steps` times the loss scale, for code that
        calls `engine.scale(loss).backward()` itself.
        """
        self.accumulation.note_backward()
        return self._own_backwards.mark(self.scaler.scale(loss / self.accumulation.steps))

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """End a micro-batch; at the boundary clip, update the parameters, forget the gradients, and move the
        schedule. With `managed_gradient_accumulation` false every call is a boundary.

        Args:
            lr_kwargs: arguments for the schedule's `step()`, such as `{"metrics": loss}`.

        A gradient that is not finite skips the update on every rank: parameters, optimizer states and
        schedule stay as they are (not with `bf16.check_grad_overflow` false). In fp16 the loss scale follows.

        Raises:
            ds_zero.LossScaleError: on every rank, when the loss scale is at its minimum and the gradient still
                not finite; names a parameter.
        """
        self._refuse_if_away("step")
        self._applied = False
        with self.accumulation.ending() as boundary:
            if self.accumulation.strict:
                self._own_backwards.check()
            if boundary:
                with self._reporting.part(timing.STEP):
                    report = self._update(lr_kwargs or {})
                self._reporting.step(report)

    def _update(self, lr_kwargs: Mapping[str, Any]) -> StepReport:
        self._norms.clip(self.job.clipping)
        lr, scale = self.get_lr()[0], self.loss_scale  # of this update; both move below
        with scaled_rates(self.optimizer, self._rate_factor()):
            self.optimizer.step()  # asks the scaler, which may leave it out
        self._applied = not self.scaler.step_was_skipped
        zero_grad(self.optimizer)
        self._own_backwards.forget()
        if not self._applied:
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        self.global_samples += self._samples()
        norm = self._norms.last()
        return StepReport(
            step=self.global_steps,
            samples=self.global_samples,
            lr=lr,
            grad_norm=norm.before if norm is not None else math.nan,
            clipped_norm=norm.after if norm is not None else math.nan,
            loss_scale=scale,
            next_scale=self.loss_scale,
            culprit=None if self._applied else self.scaler.culprit,
        )

    def _samples(self) -> int:
        """Of the step that ends, over all ranks."""
        drawn = self.training_dataloader.samples() if self.training_dataloader is not None else None
        if drawn is not None:
            return drawn
        if self.accumulation.managed:
            return self.batch.train
        return self.batch.micro * self.batch.ranks * self.accumulation.arrived

    def _rate_factor(self) -> float:
        return rate_factor(self._samples(), self.batch.train, lr_scaling_of(self.config))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step()` updates the parameters; with `managed_gradient_accumulation` false, whether one
        runs.
        """
        return self.accumulation.at_boundary()

    def get_global_grad_norm(self, clipped: bool = False) -> float | None:
        """Global 2-norm of the last step's gradient before clipping, or after it where `clipped`; of true
        values, without the loss scale. None before the first step.
        """
        norm = self._norms.last() if self._live else None
        return None if norm is None else norm.after if clipped else norm.before

    def was_step_applied(self) -> bool:
        """Whether the last `step()` changed the parameters; False off the boundary, and where it was skipped."""
        return self._applied

    @property
    def loss_scale(self) -> float:
        """What the next loss is multiplied by before backward; 1 outside fp16."""
        return self.scaler.loss_scale

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group, as the next step will use it; 0 for a group without. Where rates
        follow the size of batches, for the batch that was begun last.
        """
        factor = self._rate_factor()
        return [float(group.get("lr", 0.0)) * factor for group in self.optimizer.param_groups]

    @property
    def micro_steps(self) -> int:
        """Micro-batches since the beginning of training."""
        return self.accumulation.micro_steps

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward pass on one rank."""
        return self.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.batch.steps

    def set_train_batch_size(self, train: int) -> None:
        """Change the samples of a step from here on, and with them the number of micro-batches.

        Raises:
            ValueError: `train` is no multiple of micro-batch times ranks.
        """
        unit = self.batch.micro * self.batch.ranks
        if train < 1 or train % unit:
            raise ValueError(
                f"train_batch_size {train} has to be a multiple of train_micro_batch_size_per_gpu "
                f"{self.batch.micro} x ranks {self.batch.ranks} = {unit}"
            )
        self._set_batch(replace(self.batch, train=train, steps=train // unit))

    def set_train_micro_batch_size(self, micro: int) -> None:
        """Change the samples of a forward from here on, and with them those of a step."""
        if micro < 1:
            raise ValueError(f"train_micro_batch_size_per_gpu {micro} has to be at least 1")
        self._set_batch(replace(self.batch, micro=micro, train=micro * self.batch.steps * self.batch.ranks))

    def _set_batch(self, batch: Batch) -> None:
        if self.training_dataloader is not None and self.training_dataloader.fixed:
            raise ValueError(
                "the batch sizes are those with which data_efficiency.data_sampling has made its batches: change them "
                "in the configuration"
            )
        self.batch = batch
        self.accumulation.steps = batch.steps

    def train(self, mode: bool = True) -> Engine:
        """Put the module into training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Put the module into evaluation mode."""
        return self.train(False)

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        *,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> str:
        """Write `<save_dir>/<tag>`, complete or not at all, and name it in `<save_dir>/latest`. Every rank
        calls it.

        Args:
            tag: default `global_step<number of steps>`. An existing checkpoint of that name is replaced.
            client_state: anything of yours: numbers, texts, lists, dicts and tensors; rank 0's is kept.
            save_latest: False leaves `latest` as it is.
            exclude_frozen_parameters: leave out what does not require a gradient, for example the base model
                under adapters; a load keeps what the model has.

        Returns:
            The checkpoint's path.

        Raises:
            CheckpointError: on every rank, if any rank could not write; what was there before is untouched.
        """
        from ds_engine.build.checkpoint import Saving, save

        self._refuse_if_away("save_checkpoint")
        saving = Saving(name_latest=save_latest, frozen=not exclude_frozen_parameters)
        return save(self, save_dir, tag, client_state or {}, saving)

    def wait_for_checkpoint(self) -> None:
        """Return when no checkpoint is being written (`checkpoint.writer.decoupled`). Every rank calls it.

        Raises:
            CheckpointError: on every rank, if the last one could not be written; the one before is untouched.
        """
        if self.background is not None:
            self.background.wait()

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Continue from a checkpoint that was written on any number of ranks, at any stage, in any
        precision. Every rank calls it.

        Args:
            tag: default the one that `<load_dir>/latest` names, or the newest complete one if that is gone.
            load_module_strict: refuse a checkpoint that has tensors which the model lacks, or lacks tensors that
                it has.
            load_module_only: parameters and buffers alone: no optimizer, schedule, counters, random
                generators.

        Returns:
            The checkpoint's path, and the client state.

        Raises:
            FileNotFoundError: there is no such checkpoint; names what was looked for and what there is.
            CheckpointError: on every rank, if it is damaged (names file and tensor) or belongs to another
                model.
        """
        from ds_engine.build.checkpoint import Wanted, load

        self._refuse_if_away("load_checkpoint")
        wanted = Wanted(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            schedule=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
        )
        return load(self, load_dir, tag, wanted)

    def offload_states(
        self,
        include: Collection[str] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move sharded state to host memory, so that something else can use the accelerator; `reload_states` brings it
        back. Until then the engine refuses to train, save and load, and to run forward without its parameters. What
        rests in host memory already stays there: on a CPU nothing moves.

        Args:
            include: of "optim_states", "hp_params" (fp32 masters), "lp_params" (parameters in their compute dtype),
                "lp_grads" (reduced gradients), "contiguous_grad_buffer" (this engine keeps none between steps);
                default all.
            device: "cpu"; "none" moves nothing.
            pin_memory: page-lock the host's copies.
            non_blocking: return before the copies are complete.

        Raises:
            ValueError: an unknown state or device.
        """
        if self.background is not None:
            self.background.hold()
        self.model_state.offload(include, device, pin_memory=pin_memory, non_blocking=non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Bring back what `offload_states` moved; nothing happens where nothing was."""
        self.model_state.reload(non_blocking=non_blocking)

    def _refuse_if_away(self, doing: str, kinds: Collection[str] | None = None) -> None:
        away = self.model_state.offloaded()
        missing = sorted(away if kinds is None else away.intersection(kinds))
        if missing:
            raise RuntimeError(
                f"{doing}: {', '.join(missing)} are away since offload_states(): call engine.reload_states() first"
            )

    def activation_checkpointing(self, group: ProcessGroup | None = None) -> Recompute:
        """What recomputes layers as the section `activation_checkpointing` says: `h = recompute(layer, h)`.

        Args:
            group: the model-parallel ranks, which hold the same activations; needed for `partition_activations`.

        Raises:
            ModuleNotFoundError: ds-layers is not installed.
            ValueError: settings that do not go together.
        """
        from ds_engine.build.layers import recompute

        return recompute(self.config.activation_checkpointing, group)

    def destroy(self) -> None:
        """Undo the sharding: the module is an ordinary one again, whole on every rank. Safe to call twice."""
        if self._live:
            self._live = False
            self.monitor.close()
            self.pacing.close()
            if self.background is not None:
                self.background.close()
            self.model_state.destroy()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # not set yet: asking it would never end
            raise AttributeError(name)
        try:
            if name == "generate":
                return generate_of(self.module, divided=self.model_state.divided)
            return getattr(self.module, name)
        except AttributeError:
            raise AttributeError(
                f"neither the engine nor {type(self.module).__name__} has an attribute {name!r}"
            ) from None
