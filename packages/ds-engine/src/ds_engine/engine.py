"""The training engine: combines precision, accumulation, clipping, optimizer, schedule and checkpoints, each an
object of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ds_engine.build.data import Loader
from ds_engine.build.optimizer import zero_grad
from ds_engine.config.support.batch import Batch
from ds_engine.interfaces import Recompute, Roles, World
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
from ds_engine.training.savers import Savers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Training:
    """The objects that update the parameters."""

    module: nn.Module
    optimizer: Optimizer
    schedule: LRSchedule | None
    """None: constant learning rates."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The objects that `initialize` has built."""

    job: Job
    world: World
    training: Training
    roles: Roles
    pacing: Pacing
    reporting: Reporting
    savers: Savers = field(default_factory=Savers)
    loader: Loader | None = None


class Engine:
    """Trains one model: `loss = engine(x)`, `engine.backward(loss)`, `engine.step()`, once for every micro-batch.

    `ds_engine.initialize` constructs it. Attributes that the engine does not have are looked up in the module.
    Engines are independent of each other.
    """

    def __init__(self, parts: Parts) -> None:
        job = parts.job
        self.module = parts.training.module
        self.optimizer = parts.training.optimizer
        self.lr_scheduler = parts.training.schedule
        self.job = job
        """The job as resolved from configuration and arguments."""
        self.config = job.settings
        self.world = parts.world
        self.batch = job.batch
        self.precision = job.precision
        self.topology = job.topology
        """The position of this rank on the data-parallel and model-parallel axes."""
        self.scaler = parts.roles.guard
        self.model_state = parts.roles.state
        """The owner of parameters, gradients and optimizer states."""
        self.accumulation = Accumulation(steps=job.batch.steps, managed=job.accumulating.managed)
        self.progress = parts.reporting.progress
        self.monitor = parts.reporting.monitor
        """Writes curves; `write_events` writes your own values."""
        self.pacing = parts.pacing
        self.savers = parts.savers
        """Save the state in the background, and in the memory of hosts."""
        self.training_dataloader = parts.loader
        """The loader over `training_data`, or None. Checkpoints contain its position."""
        self.global_steps = 0
        """Number of optimizer steps since the beginning of training, including skipped ones."""
        self.global_samples = 0
        """Number of samples that all ranks together have processed."""
        self.skipped_steps = 0
        """Number of steps that were skipped because the gradient was not finite."""
        self.roles = parts.roles
        """The objects that own gradients and state, that move activations, and that record collectives."""
        self._own_backwards = OwnBackwards(parts.roles.state)
        self._reporting = parts.reporting
        self._applied = False
        self._live = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward. Floating-point tensors in the arguments are cast to the compute dtype."""
        self._refuse_if_away("forward", ("lp_params",))
        if self.module.training:
            kwargs |= self.pacing.arguments(self.global_steps)
        forward = self._reporting.part(timing.FORWARD)
        with forward, self.precision.around_forward(self.world.device.type):
            return self.module(*self.precision.cast(args), **self.precision.cast(kwargs))

    def backward(self, loss: Tensor, *, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Runs backward of `loss / gradient_accumulation_steps`, multiplied by the loss scale, so that gradients are
        averaged over the micro-batches of a step.

        Args:
            retain_graph: keep the graph for another backward.
            scale_wrt_gas: divide the loss by gradient_accumulation_steps; False if it is divided already.

        Returns:
            The loss after that division, detached, without the loss scale.

        Raises:
            ValueError: `loss` is not a single number, or does not depend on a trained parameter.
        """
        self._refuse_if_away("backward")
        if loss.numel() != 1:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)}: reduce it to a single number, for example with loss.mean()"
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
        """Returns `loss / gradient_accumulation_steps` times the loss scale, for code that calls
        `engine.scale(loss).backward()` instead of `engine.backward(loss)`.
        """
        self.accumulation.note_backward()
        return self._own_backwards.mark(self.scaler.scale(loss / self.accumulation.steps))

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        """Ends a micro-batch. At the accumulation boundary it clips, updates the parameters, clears the gradients,
        and steps the schedule. With `managed_gradient_accumulation` false, every call is a boundary.

        Args:
            lr_kwargs: arguments for the schedule's `step()`, such as `{"metrics": loss}`.

        If the gradient is not finite, the update is skipped on every rank: parameters, optimizer states and schedule
        do not change (except with `bf16.check_grad_overflow` false). In fp16 the loss scale is lowered.

        Raises:
            ds_zero.LossScaleError: on every rank, if the gradient is not finite although the loss scale is at its
            minimum. The message names a parameter.
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
        if boundary and self.savers.copies is not None:
            from ds_engine.build.checkpoint import copy_if_due

            copy_if_due(self)

    def _update(self, lr_kwargs: Mapping[str, Any]) -> StepReport:
        if self.job.is_check_due(self.global_steps + 1):
            self.model_state.check_replicas(self.global_steps + 1)
        self.roles.norms.clip(self.job.clipping)
        lr, scale = self.get_lr()[0], self.loss_scale  # of this update, before the schedule is stepped
        with scaled_rates(self.optimizer, self._rate_factor()):
            self.optimizer.step()  # the scaler may skip it
        self._applied = not self.scaler.step_was_skipped
        zero_grad(self.optimizer)
        self._own_backwards.forget()
        if not self._applied:
            self.skipped_steps += 1
        elif self.lr_scheduler is not None:
            self.lr_scheduler.step(**lr_kwargs)
        self.global_steps += 1
        self.global_samples += self._samples()
        norm = self.roles.norms.last()
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
        """Number of samples of this step, over all ranks."""
        drawn = self.training_dataloader.samples() if self.training_dataloader is not None else None
        if drawn is not None:
            return drawn
        if self.accumulation.managed:
            return self.batch.train
        return self.batch.micro * self.batch.ranks * self.accumulation.arrived

    def _rate_factor(self) -> float:
        return rate_factor(self._samples(), self.batch.train, lr_scaling_of(self.config))

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next `step()` updates the parameters; with `managed_gradient_accumulation` false, whether a
        `step()` is running.
        """
        return self.accumulation.at_boundary()

    def get_global_grad_norm(self, clipped: bool = False) -> float | None:
        """Returns the global 2-norm of the last step's gradient before clipping, or after it if `clipped`, without
        the loss scale. None before the first step.
        """
        norm = self.roles.norms.last() if self._live else None
        return None if norm is None else norm.after if clipped else norm.before

    def was_step_applied(self) -> bool:
        """Whether the last `step()` updated the parameters. False if it was not at a boundary, or was skipped."""
        return self._applied

    @property
    def loss_scale(self) -> float:
        """Factor of the next loss in backward; 1 except in fp16."""
        return self.scaler.loss_scale

    def get_lr(self) -> list[float]:
        """Returns the learning rate of each parameter group for the next step; 0 for a group without one. If rates
        follow the batch size, the rate is that for the current batch.
        """
        factor = self._rate_factor()
        return [float(group.get("lr", 0.0)) * factor for group in self.optimizer.param_groups]

    @property
    def micro_steps(self) -> int:
        """Number of micro-batches since the beginning of training."""
        return self.accumulation.micro_steps

    def train_batch_size(self) -> int:
        """Returns the number of samples per optimizer step over all ranks."""
        return self.batch.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Returns the number of samples per forward pass on one rank."""
        return self.batch.micro

    def gradient_accumulation_steps(self) -> int:
        """Returns the number of micro-batches per optimizer step."""
        return self.batch.steps

    def set_train_batch_size(self, train: int) -> None:
        """Changes the number of samples per step from now on, and with it the number of micro-batches.

        Raises:
            ValueError: `train` is not a multiple of micro-batch size times ranks.
        """
        unit = self.batch.micro * self.batch.ranks
        if train < 1 or train % unit:
            raise ValueError(
                f"train_batch_size {train} must be a multiple of train_micro_batch_size_per_gpu "
                f"{self.batch.micro} x ranks {self.batch.ranks} = {unit}"
            )
        self._set_batch(replace(self.batch, train=train, steps=train // unit))

    def set_train_micro_batch_size(self, micro: int) -> None:
        """Changes the number of samples per forward from now on, and with it the number per step."""
        if micro < 1:
            raise ValueError(f"train_micro_batch_size_per_gpu {micro} must be at least 1")
        self._set_batch(replace(self.batch, micro=micro, train=micro * self.batch.steps * self.batch.ranks))

    def _set_batch(self, batch: Batch) -> None:
        if self.training_dataloader is not None and self.training_dataloader.fixed:
            raise ValueError(
                "the batch sizes are fixed, because data_efficiency.data_sampling makes batches of these sizes: "
                "change them in the configuration"
            )
        self.batch = batch
        self.accumulation.steps = batch.steps

    def train(self, mode: bool = True) -> Engine:
        """Puts the module into training mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Engine:
        """Puts the module into evaluation mode."""
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
        """Writes `<save_dir>/<tag>` atomically, and makes `<save_dir>/latest` name it. All ranks must call it.

        Args:
            tag: name of the checkpoint. Default: `global_step<number of steps>`. An existing checkpoint of that name
                is replaced.
            client_state: values of your own: numbers, strings, lists, dicts and tensors. Rank 0's values are saved.
            save_latest: False leaves `latest` unchanged.
            exclude_frozen_parameters: leave out parameters that do not require a gradient, such as the base model of
                adapters. A load keeps the model's values of these.

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointError: on every rank, if any rank could not write. Earlier checkpoints are untouched.
        """
        from ds_engine.build.checkpoint import Saving, save

        self._refuse_if_away("save_checkpoint")
        saving = Saving(name_latest=save_latest, frozen=not exclude_frozen_parameters)
        return save(self, save_dir, tag, client_state or {}, saving)

    def wait_for_checkpoint(self) -> None:
        """Returns when no checkpoint is being written (`checkpoint.writer.decoupled`). All ranks must call it.

        Raises:
            CheckpointError: on every rank, if the last checkpoint could not be written. Earlier checkpoints are
                untouched.
        """
        self.savers.wait()

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
        """Loads a checkpoint that was written on any number of ranks, at any stage, in any precision. All ranks must
        call it.

        Args:
            tag: name of the checkpoint. Default: the one that `<load_dir>/latest` names, or the newest complete one
                if that does not exist.
            load_module_strict: refuse a checkpoint if the model lacks one of its tensors, or if it lacks one of the
                model's.
            load_module_only: load only parameters and buffers: no optimizer states, schedule, counters or random
                generators.

        Returns:
            The path of the checkpoint, and the client state.

        Raises:
            FileNotFoundError: there is no such checkpoint. The message lists the contents of the directory.
            CheckpointError: on every rank, if the checkpoint is damaged (the message names file and tensor) or was
                written for another model.
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

    def save_copy(self, client_state: Mapping[str, Any] | None = None) -> str:
        """Saves the state in the memory of the hosts (`checkpoint.memory_copies`), in place of the previous copy. All
        ranks must call it. With `interval`, `step()` does it, without a client state.

        Returns:
            The folder on this host.

        Raises:
            CheckpointError: on every rank, if any rank failed. The previous copy is untouched.
            ValueError: the configuration has no `checkpoint.memory_copies`.
        """
        from ds_engine.build.checkpoint import save_copy

        self._refuse_if_away("save_copy")
        return save_copy(self, client_state or {})

    def resume(self, load_dir: str | os.PathLike[str]) -> tuple[str, dict[str, Any]] | None:
        """Loads the newest state of this job: from the memory of the hosts (`checkpoint.memory_copies`), or the
        checkpoint that `load_checkpoint(load_dir)` loads if that is newer. All ranks must call it.

        Returns:
            The path of the checkpoint, and the client state; None if there is no checkpoint.

        Raises:
            CheckpointError: as for `load_checkpoint`. Copies that are incomplete or damaged are not used, and a warning
                says so.
        """
        from ds_engine.build.checkpoint import resume

        self._refuse_if_away("resume")
        return resume(self, load_dir)

    def offload_states(
        self,
        include: Collection[str] | None = None,
        device: str = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Moves sharded state to host memory, to free accelerator memory for other work. `reload_states` moves it
        back. Until then training, saving and loading raise, and forward raises if parameters were moved. State that
        is in host memory already stays there: on a CPU nothing moves.

        Args:
            include: any of "optim_states", "hp_params" (fp32 masters), "lp_params" (parameters in their compute
                dtype), "lp_grads" (reduced gradients), "contiguous_grad_buffer" (this engine keeps none between
                steps). Default: all.
            device: "cpu"; "none" moves nothing.
            pin_memory: use page-locked host memory for the copies.
            non_blocking: return before the copies are complete.

        Raises:
            ValueError: an unknown state or device.
        """
        self.savers.hold()
        self.model_state.offload(include, device, pin_memory=pin_memory, non_blocking=non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Moves back what `offload_states` has moved. No effect if nothing was moved."""
        self.model_state.reload(non_blocking=non_blocking)

    def _refuse_if_away(self, doing: str, kinds: Collection[str] | None = None) -> None:
        away = self.model_state.offloaded()
        missing = sorted(away if kinds is None else away.intersection(kinds))
        if missing:
            raise RuntimeError(
                f"{doing}: {', '.join(missing)} were moved to host memory by offload_states(): call "
                "engine.reload_states() first"
            )

    def activation_checkpointing(self, group: ProcessGroup | None = None) -> Recompute:
        """Returns an object that recomputes layers, configured by the section `activation_checkpointing`: `h =
        recompute(layer, h)`.

        Args:
            group: process group of the model-parallel ranks, which hold the same activations; required by
                `partition_activations`.

        Raises:
            ModuleNotFoundError: ds-layers is not installed.
            ValueError: incompatible settings.
        """
        from ds_engine.build.layers import recompute

        return recompute(self.config.activation_checkpointing, group)

    def destroy(self) -> None:
        """Undoes the sharding: the module is an ordinary module again, whole on every rank. Safe to call twice."""
        if self._live:
            self._live = False
            self.monitor.close()
            self.pacing.close()
            self.savers.close()
            self.roles.close()
            self.model_state.destroy()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def __getattr__(self, name: str) -> Any:
        if name == "module":  # not set yet: looking it up would recurse forever
            raise AttributeError(name)
        try:
            if name == "generate":
                from ds_engine.inference.generation import generate_of

                return generate_of(self.module, divided=self.model_state.divided)
            return getattr(self.module, name)
        except AttributeError:
            raise AttributeError(
                f"neither the engine nor {type(self.module).__name__} has an attribute {name!r}"
            ) from None
