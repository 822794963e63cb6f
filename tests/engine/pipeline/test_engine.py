"""What the pipeline engine has besides training steps: data, evaluation, settings, precision, mistakes."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_engine
from ds_pipe.errors import PipelineError
from ds_pipe.model import LayerSpec, PipelineModule
from engine.pipeline.test_training import COUNT, config, data, started, trained
from harness import ranks
from pipe.model.test_pipeline import items, module, trained_alone


def gathered(value):
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def pairs(count: int):
    """A data set of single samples."""
    return [(x[0], y[0]) for x, y in items(0, 0, count)]


@ranks(2)
def test_data_evaluation_and_settings(tmp_path):
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "curves"}
    built = module(2, True)
    settings = config(1, 1.0, csv_monitor=monitor, steps_per_print=1, startup_summary=True)
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 0.1}}
    said = io.StringIO()
    with redirect_stderr(said):
        engine, _, _, scheduler = ds_engine.initialize(
            built, {**settings, "scheduler": schedule}, training_data=pairs(40)
        )
    assert isinstance(engine, ds_engine.PipelineEngine) and scheduler is engine.lr_scheduler
    assert engine.is_first_stage() == (dist.get_rank() == 0) and engine.is_last_stage() == (
        dist.get_rank() == 1
    )
    assert engine.is_gradient_accumulation_boundary()
    engine.set_has_attention_mask(True)
    engine.reset_activation_shape()

    # The loader of training_data again and again: five steps to the epoch.
    with redirect_stderr(said):
        losses = [engine.train_batch().item() for _ in range(6)]
    assert len(set(gathered(losses)[0])) == 6 and gathered(losses)[0] == gathered(losses)[1]
    assert engine.get_lr()[0] > 0 and engine.get_global_grad_norm() > 0
    assert len(set(gathered(engine.get_global_grad_norm()))) == 1
    told = all(word in said.getvalue() for word in ("loss", "pipeline", "layers 0-"))
    assert told == (dist.get_rank() == 0), said.getvalue()
    if dist.get_rank() == 0:
        assert (tmp_path / "curves" / "Train_Samples_train_loss.csv").read_text().count("\n") == 7

    # Evaluation changes nothing, and gives the same on all ranks.
    loss, outputs = engine.eval_batch(data(engine, 9), return_logits=True)
    again = engine.eval_batch(data(engine, 9, 2), num_micro_batches=2)
    assert built.training and loss == engine.eval_batch(data(engine, 9)) != again
    assert (outputs is None) == (dist.get_rank() == 0)
    assert outputs is None or [tuple(o.shape) for o in outputs] == [(2, 6, 11)] * COUNT
    inferred = engine.inference_batch((x, None) for x, _ in data(engine, 9))
    averaged = engine.eval_batch(data(engine, 9), compute_loss=False)
    if outputs is not None:
        assert all(torch.equal(a, b) for a, b in zip(outputs, inferred, strict=True))
        assert torch.equal(averaged, torch.stack(outputs).mean(0))
    assert engine.broadcast_from_last(outputs)[0].shape == (2, 6, 11)

    # Iterators, functions of batches, other numbers of micro-batches.
    engine.set_dataiterator({"x": x, "y": y} for x, y in data(engine, 3, 6))
    engine.set_batch_fn(lambda item: (item["x"], item["y"]))
    engine.set_train_batch_size(12)
    assert engine.gradient_accumulation_steps() == 6
    assert engine.train_batch() > 0
    assert engine.global_steps == 7 and engine.micro_steps == 6 * COUNT + 6

    for call in (lambda: engine(1), lambda: engine.backward(loss), engine.step, lambda: engine.scale(loss)):
        with pytest.raises(RuntimeError, match=r"train_batch\(data\)"):
            call()
    engine.destroy()
    engine.destroy()


@ranks(2)
def test_precisions_offload_and_optimizers():
    """Losses follow fp32 within the precision; every rank has the same."""
    cases = {
        "fp32": config(2, 1.0),
        "bf16": config(2, 1.0, bf16={"enabled": True}),
        "autocast": config(3, torch_autocast={"enabled": True, "dtype": "bf16"}),
        "fp16": config(1, 1.0, fp16={"enabled": True, "initial_scale_power": 8}),
        "host": config(2, 1.0) | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    }
    losses = {}
    for name, settings in cases.items():
        engine = started(2, settings, tied=name != "autocast", schedule="1f1b")
        losses[name] = trained(engine, 3)
        engine.destroy()
    assert gathered(losses)[0] == gathered(losses)[1]
    for name, values in losses.items():
        if name != "autocast":
            assert values == pytest.approx(losses["fp32"], rel=1e-5 if name == "host" else 3e-2), name
    # An overflow in one stage skips the step of all.
    engine = started(2, config(1, fp16={"enabled": True, "initial_scale_power": 32, "hysteresis": 1}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(engine, 2)
    assert gathered((engine.skipped_steps, engine.loss_scale)) == [(2, 2.0**30)] * 2
    engine.destroy()


@ranks(4)
def test_one_bit_adam_in_every_stage():
    """Before its compression begins it is Adam; after that every stage averages over its own replicas."""
    params = {"lr": 1e-2, "freeze_step": 3}
    losses = {}
    for name, own in (("OneBitAdam", params), ("AdamW", {"lr": 1e-2, "weight_decay": 0.0})):
        engine = started(2, config(0, 0.5, optimizer={"type": name, "params": own}))
        losses[name] = trained(engine, 6)
        norms = gathered(engine.get_global_grad_norm())
        assert len(set(norms)) <= 2 and norms[0] > 0
        engine.destroy()
    assert losses["OneBitAdam"][:3] == pytest.approx(losses["AdamW"][:3], rel=1e-5)
    assert losses["OneBitAdam"] == pytest.approx(losses["AdamW"], rel=2e-2)


@ranks(2)
def test_mistakes_are_errors_on_all_ranks():
    def refused(settings, message, built=None, **more):
        with pytest.raises((ds_engine.ConfigError, ValueError), match=message):
            ds_engine.initialize(built or module(2), settings, **more)

    refused(config(1, pipeline={"stages": 4}), "another number of stages")
    refused(config(1, pipeline={"schedule": "zb-v"}), "pass PipelineModule")
    refused(config(1), "object has no method get_data_parallel_group", mpu=object())
    first = dist.get_rank() == 0
    parts = [0, 3, 11] if first else [0, 4, 11]
    refused(config(1), "the division of the layers", module(2, partition_method=parts))
    idle = [LayerSpec(nn.Linear, 4, 4), LayerSpec(nn.ReLU)]
    refused(
        config(1),
        "pipeline rank 1 of 2 have no parameter",
        PipelineModule(idle, 2, partition_method=[0, 1, 2]),
    )
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="use TiedLayerSpec"):
        PipelineModule([shared, nn.Linear(4, 4), shared], 2, partition_method=[0, 1, 3])

    # The section reaches the pipeline.
    section = {"schedule": "gpipe", "activation_checkpoint_interval": 1, "receive_ahead": 2, "timeout_s": 30}
    engine = started(2, config(1, pipeline={**section, "max_unsharded": 1}))
    pipeline = engine.pipeline._pipeline
    executor = pipeline._executor(COUNT, trains=True)
    assert executor.schedule.name == "gpipe" and pipeline.options.timeout_s == 30
    assert (pipeline.options.receive_ahead, pipeline.options.max_unsharded) == (2, 1)
    assert not pipeline._stages[dist.get_rank()].options.split_backward  # recomputing
    assert trained(engine, 2) == pytest.approx(trained_alone(2, COUNT, 1, False, None)[0], rel=1e-5)

    # A rank without data, or with other things than pairs, ends all of them.
    with pytest.raises(
        PipelineError, match="rank 0 could not read its data: TypeError: micro-batch 0 is a int"
    ):
        engine.train_batch(iter([1, 2, 3, 4]) if first else data(engine, 0))
    engine.destroy()
