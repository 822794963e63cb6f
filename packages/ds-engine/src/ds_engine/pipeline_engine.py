"""The engine of a pipeline model: a whole step is one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ds_engine.build.data import RepeatingLoader
from ds_engine.config.support.batch import Batch
from ds_engine.engine import Engine, Parts
from ds_engine.interfaces import RunsPipeline
from ds_engine.training import timing

Reduce = Literal["avg"] | None
LossWeights = Sequence[float] | Callable[[Any], float]


class PipelineEngine(Engine):
    """Trains a `ds_pipe.model.PipelineModule`: `loss = engine.train_batch(data)`, once for every optimizer step.

    `ds_engine.initialize` constructs it. Checkpoints, schedules, clipping and everything else that is not forward and
    backward are those of `Engine`. Ranks with the first or the last stage read data; the others need none.
    """

    def __init__(self, parts: Parts, pipeline: RunsPipeline) -> None:
        super().__init__(parts)
        self.pipeline = pipeline
        """Runs the stages of this rank."""
        self.accumulation.strict = False  # backwards are not counted here
        self._data: Iterator[Any] | None = None
        self._own_data = False
        self._batch_fn: Callable[[Any], Any] | None = None

    def train_batch(
        self, data_iter: Iterable[Any] | None = None, *, loss_weights: LossWeights | None = None
    ) -> Tensor:
        """Trains one step: forwards and backwards of `gradient_accumulation_steps()` micro-batches, clipping, update,
        schedule. All ranks must call it.

        Args:
            data_iter: gives pairs (inputs, labels), one for each micro-batch; it goes on from step to step. Default:
                that of `set_dataiterator`, or the loader of `training_data`, again and again.
            loss_weights: a function that is called with the labels of each micro-batch and returns its weight, such as
                its number of tokens; all ranks must pass it. The loss is then the weighted mean over all micro-batches
                of all data-parallel ranks. Or, on the rank of the last stage, factors of the losses of its
                micro-batches, which are added and not divided. Default: all micro-batches count the same.

        Returns:
            The mean loss over micro-batches and data-parallel ranks, the same on all ranks.

        Raises:
            PipelineError: on every rank, if a stage has failed on some rank, or the data of a rank have ended. The
                process group cannot be used afterwards.
        """
        loss = self.forward_backward(data_iter, loss_weights=loss_weights)
        super().step()
        return loss

    def forward_backward(
        self, data_iter: Iterable[Any] | None = None, *, loss_weights: LossWeights | None = None
    ) -> Tensor:
        """The first part of `train_batch`: forwards and backwards of the micro-batches of a step, without an update,
        with the same arguments, result and errors.
        """
        self._refuse_if_away("train_batch")
        self.train()
        # On all ranks, before the scale of this step is used: only the rank of the last stage scales losses.
        self.scaler.scale(torch.zeros(()))
        self.accumulation.note_backward()
        with self._reporting.part(timing.FORWARD):
            loss = self.pipeline.train(self._micro_batches(data_iter), loss_weights)
        self._reporting.add_loss(loss)
        self.accumulation.micro_steps += self.batch.steps - 1
        return loss

    def eval_batch(
        self,
        data_iter: Iterable[Any] | None = None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: Reduce = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Runs forwards without gradients, with the module in evaluation mode. All ranks must call it.

        Args:
            data_iter: as for `train_batch`.
            return_logits: also return the outputs of the last stage, a list with one for each micro-batch.
            compute_loss: False: labels are not used, and the outputs take the place of the loss.
            reduce_output: "avg": the mean over micro-batches (and data-parallel ranks, for the loss); None: of outputs,
                a list with one for each micro-batch.
            bcast_loss: has no effect: the loss is the same on all ranks anyway.
            num_micro_batches: number of micro-batches. Default: that of training.

        Returns:
            The mean loss; with `return_logits` (loss, outputs). Outputs are None on ranks without the last stage.

        Raises:
            PipelineError: as `train_batch`.
        """
        if reduce_output not in ("avg", None):
            raise ValueError(f'reduce_output={reduce_output!r}: give "avg" or None')
        count = self.batch.steps if num_micro_batches is None else num_micro_batches
        keep = return_logits or not compute_loss
        loss, outputs = self._evaluated(data_iter, count, with_loss=compute_loss, keep=keep)
        shown = list(outputs) if self.pipeline.is_last else None
        if compute_loss:
            return (loss, shown) if return_logits else loss
        result: Any
        if shown is None or reduce_output is None:
            result = shown
        elif not all(isinstance(output, Tensor) for output in shown):
            raise ValueError(
                'reduce_output="avg" with compute_loss=False is the mean of output tensors, but the outputs of the '
                f"last stage are {type(shown[0]).__name__}: pass reduce_output=None"
            )
        else:
            result = torch.stack([output.float() for output in shown]).mean(0)
        return (result, shown) if return_logits else result

    def inference_batch(
        self, data_iter: Iterable[Any] | None = None, num_micro_batches: int | None = None
    ) -> list[Any] | None:
        """Returns the outputs of the last stage, one for each micro-batch; None on ranks without it. All ranks must
        call it. The second item of each pair of the data is not used, and may be None.
        """
        count = self.batch.steps if num_micro_batches is None else num_micro_batches
        _, outputs = self._evaluated(data_iter, count, with_loss=False, keep=True)
        return list(outputs) if self.pipeline.is_last else None

    def broadcast_from_last(self, value: Any) -> Any:
        """Returns the value of the rank with the last stage, on all ranks of its pipeline. All of them must call it."""
        group, last = self.pipeline.last_group()
        if group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, last, group)
        return box[0]

    # --- data

    def set_dataloader(self, loader: Iterable[Any]) -> None:
        """Reads data from a loader from now on, again and again."""
        self._data, self._own_data = iter(RepeatingLoader(loader)), False

    def set_dataiterator(self, iterator: Iterable[Any]) -> None:
        """Reads data from an iterator from now on, until it ends."""
        self._data, self._own_data = iter(iterator), False

    def set_batch_fn(self, function: Callable[[Any], Any]) -> None:
        """Sets a function that makes the pair (inputs, labels) of a micro-batch from an item of the data."""
        self._batch_fn = function

    def _micro_batches(self, data_iter: Iterable[Any] | None) -> Iterator[Any]:
        if not (self.pipeline.is_first or self.pipeline.is_last):
            return iter(())
        return self._prepared(data_iter)

    def _prepared(self, data_iter: Iterable[Any] | None) -> Iterator[Any]:
        """Yields micro-batches on the device, with inputs in the compute dtype."""
        device = self.world.device
        for item in self._stream() if data_iter is None else data_iter:
            pair = item if self._batch_fn is None else self._batch_fn(item)
            if device.type != "cpu":
                pair = tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), pair)
            if isinstance(pair, (tuple, list)) and len(pair) == 2:
                pair = self.precision.cast(pair[0]), pair[1]
            yield pair

    def _stream(self) -> Iterator[Any]:
        if self._data is None:
            if self.training_dataloader is None:
                raise ValueError(
                    "there are no data: pass an iterator to this call, training_data to initialize(), or call "
                    "engine.set_dataiterator(...)"
                )
            self._data, self._own_data = RepeatingLoader(self.training_dataloader), True
        return self._data

    def _evaluated(
        self, data_iter: Iterable[Any] | None, count: int, *, with_loss: bool, keep: bool
    ) -> tuple[Tensor, tuple[Any, ...]]:
        self._refuse_if_away("eval_batch", ("lp_params",))
        was_training = self.module.training
        self.eval()
        try:
            return self.pipeline.evaluate(
                self._micro_batches(data_iter), num_microbatches=count, with_loss=with_loss, keep_outputs=keep
            )
        finally:
            self.train(was_training)

    # --- settings

    def is_first_stage(self) -> bool:
        """Whether this rank has the first stage, which gets the inputs."""
        return self.pipeline.is_first

    def is_last_stage(self) -> bool:
        """Whether this rank has the last stage, which gets the labels."""
        return self.pipeline.is_last

    def is_gradient_accumulation_boundary(self) -> bool:
        """Always True: every `train_batch` ends with an update."""
        return True

    def set_has_attention_mask(self, value: bool) -> None:
        """Does nothing: stages may pass tensors that need no gradient, such as masks, at any place."""

    def reset_activation_shape(self) -> None:
        """Does nothing: shapes may change with every micro-batch."""

    def _set_batch(self, batch: Batch) -> None:
        self.pipeline.set_num_microbatches(batch.steps)
        super()._set_batch(batch)

    # --- what a pipeline replaces

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises RuntimeError: no rank has the whole model."""
        _refuse("engine(...)")

    def backward(self, loss: Tensor, *, retain_graph: bool = False, scale_wrt_gas: bool = True) -> NoReturn:
        """Raises RuntimeError: `train_batch` runs backwards."""
        _refuse("engine.backward(loss)")

    def scale(self, loss: Tensor) -> NoReturn:
        """Raises RuntimeError: `train_batch` scales losses."""
        _refuse("engine.scale(loss)")

    def step(self, lr_kwargs: Mapping[str, Any] | None = None) -> NoReturn:
        """Raises RuntimeError: `train_batch` updates the parameters."""
        _refuse("engine.step()")

    # --- state

    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], tag: str | None = None, **options: bool
    ) -> tuple[str, dict[str, Any]]:
        """As `Engine.load_checkpoint`. The job that wrote it may have had other numbers of stages and data-parallel
        ranks, and another ZeRO stage.
        """
        loaded = super().load_checkpoint(load_dir, tag, **options)
        self._data_moved()
        return loaded

    def resume(self, load_dir: str | os.PathLike[str]) -> tuple[str, dict[str, Any]] | None:
        """As `Engine.resume`."""
        resumed = super().resume(load_dir)
        self._data_moved()
        return resumed

    def _data_moved(self) -> None:
        """The loader of `training_data` begins at its restored position."""
        if self._own_data:
            self._data = None

    def destroy(self) -> None:
        """Ends the pipeline, and undoes the sharding. Safe to call twice."""
        live = self._live
        super().destroy()
        if live:
            self.pipeline.close()


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"{what}: a pipeline has other layers on every rank, and runs the micro-batches of a step together. Call "
        "engine.train_batch(data), engine.eval_batch(data) or engine.inference_batch(data)"
    )
