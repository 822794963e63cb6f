"""`DeepSpeedEngine`: the interface of DeepSpeed's engine, on top of `ds_engine.Engine`.

Its methods delegate to the inner engine, or return settings.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import ds_engine
import ds_zero
from ds_compat.checkpoint import files as checkpoint
from ds_compat.checkpoint.consolidated import consolidated, save_weights
from ds_compat.checkpoint.tags import agreed_tag, tag_validation
from ds_compat.config.deepspeed_config import DeepSpeedConfig
from ds_compat.engine.answers import ZeroAnswers, answer, of_config
from ds_compat.engine.dataloader import loader
from ds_compat.engine.monitor import monitor
from ds_compat.engine.optimizer import wrap
from ds_compat.engine.plain_loops import raising_assertion_error, scale_gradients, take_gradients
from ds_compat.utils.logs import log_dist, logger
from ds_compat.utils.timer import ThroughputTimer
from ds_engine.build.data import Loader
from ds_engine.build.optimizer import zero_grad

_OWN = frozenset(
    {"global_steps", "global_samples", "micro_steps", "skipped_steps", "lr_scheduler", "generate"}
)
"""Attributes of the inner engine, which can be read and written."""


class DeepSpeedEngine(ZeroAnswers, nn.Module):
    """`deepspeed.initialize` constructs it. Attributes that it does not have are looked up in the module."""

    _engine: ds_engine.Engine
    module: nn.Module

    def __init__(
        self,
        engine: ds_engine.Engine,
        config: DeepSpeedConfig,
        *,
        has_optimizer: bool = True,
        mpu: Any = None,
    ) -> None:
        super().__init__()
        self._modules["module"] = (
            engine.module
        )  # so that state_dict() and parameters() have the prefix "module."
        vars(self).update(module=engine.module, _engine=engine)
        # Loops for DeepSpeed may step without a backward, or call loss.backward() themselves.
        engine.accumulation.strict = False
        shown: Literal["nothing", "reduced"] = "nothing" if self.zero_optimization() else "reduced"
        ds_zero.set_presentation(engine.module, gradients=shown, refuse_state_dict=False)
        self._config = config
        self.config = config.raw
        self.basic_optimizer = engine.optimizer if has_optimizer else None
        self.optimizer = wrap(engine, config) if has_optimizer else None
        self.training_dataloader: Loader | None = None
        self.collate_fn: Callable[[list[Any]], Any] | None = None
        self.mpu = mpu
        self.client_lr_scheduler: Any = None
        self.tput_timer = ThroughputTimer(batch_size=engine.train_batch_size())
        self.is_compiled = False
        self.loaded_checkpoint_mp_world_size = self.loaded_checkpoint_dp_world_size = None
        self._backward_depth = 0
        self._in_no_sync = False

    # --- training

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self.training:
            self.tput_timer.start()
        output = self._engine(*inputs, **kwargs)
        if torch.is_grad_enabled() and self.gradient_accumulation_steps() > 1:
            scale_gradients(output, self._factor_of_plain_backward)
        return output

    def _factor_of_plain_backward(self) -> float:
        """Returns the factor by which gradients of a plain `loss.backward()` are averaged over micro-batches."""
        return 1.0 if self._backward_depth else 1.0 / self.gradient_accumulation_steps()

    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        assert self.optimizer is not None, "must provide optimizer during init in order to use backward"
        _check_scalar(loss)
        self._backward_depth += 1
        try:
            return self._engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=scale_wrt_gas)
        finally:
            self._backward_depth -= 1

    def scale(self, loss: Tensor, retain_graph: bool = False) -> Tensor:
        """Returns the loss times the loss scale, on which `.backward()` can be called, also several times."""
        _check_scalar(loss)
        return self._engine.scaler.scale(loss)

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> None:
        assert self.optimizer is not None, "must provide optimizer during init in order to use step"
        assert not self._in_no_sync, "It is illegal to call Engine.step() inside no_sync context manager"
        if self.zero_optimization_stage() == 0:
            take_gradients(self.module, self._engine.loss_scale)
        boundary = self.is_gradient_accumulation_boundary()
        with raising_assertion_error():
            self._engine.step(lr_kwargs)
        self.tput_timer.stop(global_step=boundary)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context manager in which backwards accumulate gradients without a reduction, at every stage."""
        assert not self._in_no_sync, (
            "no_sync context manager reentry is unsupported: no_sync and coalesce_grad_reduction cannot be nested"
        )
        self._in_no_sync = True
        try:
            with ds_zero.no_sync(self.module):
                yield
        finally:
            self._in_no_sync = False

    coalesce_grad_reduction = no_sync

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._engine.is_gradient_accumulation_boundary()

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        accumulation = self._engine.accumulation
        assert accumulation.managed, (
            "set_gradient_accumulation_boundary has no effect if managed_gradient_accumulation is false, because every "
            "step() is then a boundary: do not call it, or set managed_gradient_accumulation to true"
        )
        accumulation.forced = is_boundary

    def was_step_applied(self) -> bool:
        return self._engine.was_step_applied()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients since the last step."""
        zero_grad(self._engine.optimizer)
        for param in self.module.parameters():
            param.grad = None

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Does nothing: gradients are reduced by the backward at the boundary, or by step()."""

    def train(self, mode: bool = True) -> DeepSpeedEngine:
        self.training = mode
        self.module.train(mode)
        return self

    def eval(self) -> DeepSpeedEngine:
        return self.train(False)

    def compile(
        self,
        backend: str | None = None,
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compiles the module in place, by torch.compile."""
        options = {k: v for k, v in (compile_kwargs or {}).items() if k != "backend"}
        self.module.compile(backend=backend or "inductor", **options)
        self.is_compiled = True

    def destroy(self) -> None:
        """Undoes the sharding. The engine cannot be used afterwards."""
        self._engine.destroy()

    # --- state and settings

    def get_global_grad_norm(self) -> float | None:
        return self._engine.get_global_grad_norm()

    def get_lr(self) -> list[float]:
        return self._group_option("lr")

    def get_type(self) -> list[Any]:
        return self._group_option("type")

    def get_mom(self) -> list[Any]:
        return self._group_option("momentum" if self.optimizer_name() in ("SGD", "RMSprop") else "betas")

    def _group_option(self, name: str) -> list[Any]:
        return [group.get(name, 0.0) for group in self._engine.optimizer.param_groups]

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every group, until a schedule changes it."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def train_batch_size(self) -> int:
        return self._engine.train_batch_size()

    def train_micro_batch_size_per_gpu(self) -> int:
        return self._engine.train_micro_batch_size_per_gpu()

    def gradient_accumulation_steps(self) -> int:
        return self._engine.gradient_accumulation_steps()

    def get_batch_info(self) -> tuple[int, int, int]:
        return (
            self.train_batch_size(),
            self.train_micro_batch_size_per_gpu(),
            self.gradient_accumulation_steps(),
        )

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Sets the batch size, by changing the number of micro-batches per step."""
        self._engine.set_train_batch_size(train_batch_size)
        self._config.take_batch(self._engine.batch)

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Sets the size of micro-batches. Their number per step stays the same, so the batch size changes."""
        self._engine.set_train_micro_batch_size(micro_batch_size)
        self._config.take_batch(self._engine.batch)

    device = property(lambda self: self._engine.world.device)
    world_size = dp_world_size = property(lambda self: self._engine.world.world_size)
    global_rank = property(lambda self: self._engine.world.rank)
    local_rank = property(lambda self: self._engine.world.local_rank)
    data_parallel_group = seq_data_parallel_group = property(lambda self: torch.distributed.group.WORLD)
    mp_world_size = property(lambda self: 1)
    monitor = property(lambda self: monitor(self))
    loss_scale_value = property(lambda self: getattr(self.optimizer, "loss_scale", 1.0))

    def get_data_parallel_rank(self) -> int:
        return int(self.global_rank)

    def get_model_parallel_rank(self) -> int:
        return 0

    optimizer_name = of_config("optimizer_name")
    optimizer_params = of_config("optimizer_params")
    scheduler_name = of_config("scheduler_name")
    scheduler_params = of_config("scheduler_params")

    def zero_optimization(self) -> bool:
        return self.zero_optimization_stage() > 0

    def zero_optimization_stage(self) -> int:
        return self._engine.config.zero_optimization.stage

    def zero_optimization_partition_gradients(self) -> bool:
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        return self.zero_optimization_stage() >= 3

    def zero_cpu_offload(self) -> bool:
        return self._engine.config.zero_optimization.offload_optimizer.device == "cpu"

    zero_use_cpu_optimizer = zero_cpu_offload

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """(dtype of parameters, dtype in which gradients are summed)."""
        return self._engine.precision.param_dtype or torch.float32, torch.float32

    def dynamic_loss_scale(self) -> bool:
        return bool(self.fp16_enabled() and self.loss_scale() == 0)

    def log_level(self) -> str | None:
        return getattr(self._config, "log_level", None)

    # For each setting with a method in DeepSpeed: its path in the configuration, and its default.
    is_sanity_checks_enabled = answer("zero_optimization.enable_sanity_checks", False)
    zero_allow_untested_optimizer = answer("zero_allow_untested_optimizer", False)
    zero_force_ds_cpu_optimizer = answer("zero_force_ds_cpu_optimizer", True)
    fp16_enabled = answer("fp16.enabled", False)
    fp16_auto_cast = answer("fp16.auto_cast", False)
    loss_scale = answer("fp16.loss_scale", 0)
    bfloat16_enabled = answer("bf16.enabled", False)
    torch_autocast_enabled = answer("torch_autocast.enabled", False)
    torch_autocast_dtype = answer("torch_autocast.dtype", None)
    communication_data_type = answer("communication_data_type", None)
    gradient_clipping = of_config("gradient_clipping")
    gradient_predivide_factor = answer("gradient_predivide_factor", 1.0)
    managed_gradient_accumulation = answer("managed_gradient_accumulation", True)
    steps_per_print = answer("steps_per_print", None)
    wall_clock_breakdown = answer("wall_clock_breakdown", False)
    memory_breakdown = answer("memory_breakdown", False)
    dump_state = answer("dump_state", False)
    dataloader_drop_last = answer("dataloader_drop_last", False)
    sparse_gradients_enabled = answer("sparse_gradients", False)
    load_universal_checkpoint = answer("checkpoint.load_universal", False)
    use_node_local_storage = answer("checkpoint.use_node_local_storage", False)
    autotuning_enabled = answer("autotuning.enabled", False)
    flops_profiler_enabled = answer("flops_profiler.enabled", False)
    curriculum_learning_enabled = answer("data_efficiency.data_sampling.curriculum_learning.enabled", False)
    random_ltd_enabled = answer("data_efficiency.data_routing.random_ltd.enabled", False)
    autotp_size = answer("tensor_parallel.autotp_size", 0)

    # --- data

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """Returns a loader of this rank's part of `dataset`; shuffled for the route "train", in order for others."""
        return loader(self, dataset, batch_size, route, data_sampler, collate_fn or self.collate_fn)

    # --- checkpoints

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        self._engine.save_checkpoint(
            save_dir,
            None if tag is None else agreed_tag(str(tag), tag_validation(self.config)),
            client_state,
            save_latest=save_latest,
            exclude_frozen_parameters=exclude_frozen_parameters,
        )
        if self.zero_optimization() and self.global_rank == 0:
            checkpoint.leave_script(save_dir)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Returns (None, None) and warns if there is no file `latest` and no tag is given."""
        if tag is None and not os.path.isfile(os.path.join(load_dir, "latest")):
            logger.warning(
                f"Unable to find latest file at {os.path.join(load_dir, 'latest')}: nothing is loaded, training "
                "starts from the beginning. Pass tag=... if there is a checkpoint."
            )
            return None, None
        return self._engine.load_checkpoint(
            load_dir,
            None if tag is None else str(tag),
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
        )

    def module_state_dict(
        self,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """Returns the state_dict of the module. At stage 3 sharded parameters have no values in it: see
        `_zero3_consolidated_16bit_state_dict`.
        """
        state = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        frozen = {prefix + n for n, p in self.module.named_parameters() if not p.requires_grad}
        return {k: v for k, v in state.items() if not exclude_frozen_parameters or k not in frozen}

    def load_module_state_dict(
        self, checkpoint: Mapping[str, Any], strict: bool = True, custom_load_fn: Any = None, **_: Any
    ) -> None:
        """Loads whole values, `checkpoint["module"]` or `checkpoint` itself, into the module, its fp32 masters and
        the shards of all ranks.
        """
        values = checkpoint.get("module", checkpoint)
        if custom_load_fn is not None:
            with ds_zero.gathered(self.module.parameters(), write=True):
                custom_load_fn(src=values, dst=self.module)
            return
        ds_zero.load_full_state_dict(self.module, values, strict=strict)

    def _consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        if not self.zero_optimization_partition_weights():
            raise ValueError(
                "consolidated_16bit_state_dict is only applicable to cases where weights are partitioned"
            )
        return self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> OrderedDict[str, Tensor] | None:
        """Returns whole values in the compute dtype on rank 0; None on other ranks. Collective."""
        if not self.zero_optimization_partition_weights():
            raise ValueError("this function requires ZeRO-3 mode")
        return consolidated(self.module, exclude_frozen=exclude_frozen_parameters)

    def save_16bit_model(
        self,
        save_dir: str | os.PathLike[str],
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Saves whole weights in the compute dtype to one file by torch.save. At stage 3 it needs
        stage3_gather_16bit_weights_on_model_save. Collective.
        """
        path = os.path.join(save_dir, save_filename)
        if self.zero_optimization_partition_weights() and not self.zero_gather_16bit_weights_on_model_save():
            log_dist(
                f"Did not save the model {path} because stage3_gather_16bit_weights_on_model_save is False",
                ranks=[0],
            )
            return False
        save_weights(path, consolidated(self.module, exclude_frozen=exclude_frozen_parameters))
        return True

    def save_fp16_model(
        self, save_dir: str | os.PathLike[str], save_filename: str = "pytorch_model.bin"
    ) -> bool:
        return self.save_16bit_model(save_dir, save_filename)

    def _get_optimizer_ckpt_name(self, checkpoints_path: str, tag: str, expp_rank: int = 0) -> str:
        return checkpoint.get_zero_ckpt_name_for_rank(
            os.path.join(checkpoints_path, tag), self.global_rank, 0
        )

    # --- the rest

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """Names of weights whose gradients are sent by rows."""
        kinds = (nn.Embedding, nn.EmbeddingBag) if self.sparse_gradients_enabled() else ()
        return {f"{name}.weight" for name, module in self.module.named_modules() if isinstance(module, kinds)}

    def offload_states(
        self,
        include: Any = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        self._engine.offload_states(include, device, pin_memory, non_blocking)

    def reload_states(self, non_blocking: bool = False) -> None:
        self._engine.reload_states(non_blocking)

    def empty_partition_cache(self) -> None:
        """Does nothing: gathered parameters are always freed after their last use."""

    def set_data_post_process_func(self, post_process_func: Callable[..., Any]) -> None:
        if self.training_dataloader is not None:
            self.training_dataloader.post_process_func = post_process_func

    def set_custom_curriculum_learning_schedule(self, schedule_func_dict: Mapping[str, Any]) -> None:
        if self.training_dataloader is not None and self.curriculum_learning_enabled():
            self.training_dataloader.set_difficulties(schedule_func_dict)

    def __getattr__(self, name: str) -> Any:
        if name in _OWN and "_engine" in vars(self):
            return getattr(self._engine, name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in vars(self):
                raise
        if hasattr(self.module, name):
            return getattr(self.module, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "micro_steps":
            self._engine.accumulation.micro_steps = value
        elif name in _OWN:
            setattr(self._engine, name, value)
        elif name in ("module", "optimizer"):
            vars(self)[name] = value  # not registered: an optimizer is no submodule
            if name == "module":
                self._modules["module"] = value
        else:
            super().__setattr__(name, value)


def _check_scalar(loss: Tensor) -> None:
    assert loss.numel() == 1, f"loss must be a scalar tensor, but has shape {tuple(loss.shape)}"
