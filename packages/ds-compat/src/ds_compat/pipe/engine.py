"""`PipelineEngine`: DeepSpeed's engine for a `PipelineModule`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import Tensor

import ds_engine
from ds_compat.engine.engine import DeepSpeedEngine
from ds_pipe.errors import PipelineError

__all__ = ["PipelineEngine", "PipelineError"]


def _same(name: str) -> Callable[..., Any]:
    """A method that is the engine's."""

    def call(self: PipelineEngine, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._engine, name)(*args, **kwargs)

    return call


class PipelineEngine(DeepSpeedEngine):
    """`deepspeed.initialize` constructs it for a `PipelineModule`; `ds_engine.PipelineEngine` describes the methods."""

    _engine: ds_engine.PipelineEngine

    def train_batch(self, data_iter: Iterable[Any] | None = None) -> Tensor:
        self.tput_timer.start()
        loss = self._engine.train_batch(data_iter)
        self.tput_timer.stop(global_step=True)
        return loss

    eval_batch = _same("eval_batch")
    inference_batch = _same("inference_batch")
    set_dataloader = _same("set_dataloader")
    set_dataiterator = _same("set_dataiterator")
    set_batch_fn = _same("set_batch_fn")
    is_first_stage = _same("is_first_stage")
    is_last_stage = _same("is_last_stage")
    set_has_attention_mask = _same("set_has_attention_mask")
    reset_activation_shape = _same("reset_activation_shape")

    def is_pipe_parallel(self) -> bool:
        return self._engine.topology.pipe.size > 1

    def is_data_parallel(self) -> bool:
        return self._engine.topology.data.size > 1

    grid = property(lambda self: self.module.mpu())
    num_stages = property(lambda self: self.module.num_stages)
    stage_id = property(lambda self: self.module.stage_id)
    micro_batches = property(lambda self: self.gradient_accumulation_steps())
    micro_batch_size = property(lambda self: self.train_micro_batch_size_per_gpu())
    dp_world_size = property(lambda self: self._engine.topology.data.size)
    mp_world_size = property(lambda self: self._engine.topology.tensor.size)
    data_parallel_group = seq_data_parallel_group = property(
        lambda self: self.module.mpu().get_data_parallel_group()
    )

    def get_data_parallel_rank(self) -> int:
        return self._engine.topology.data.index

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse()

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse()

    def step(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse()


def _refuse() -> NoReturn:
    raise PipelineError(
        "Only train_batch() is accessible in pipeline mode: it runs forward, backward and step of all micro-batches "
        "(eval_batch() evaluates)"
    )
