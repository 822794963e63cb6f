"""`deepspeed.pipe`: a script for DeepSpeed's pipeline runs unchanged, and trains as one process does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import deepspeed
from engine.pipeline.test_training import COUNT, config
from harness import ranks
from pipe.executor.models import loss_fn
from pipe.model.test_pipeline import items, layers, trained_alone


@ranks(4, groups_may_stay=True)
def test_a_script_with_two_stages(tmp_path):
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.engine import PipelineEngine, PipelineError
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid

    with pytest.raises(RuntimeError, match="must provide num_stages or topology"):
        PipelineModule(layers=layers())
    topology = PipeDataParallelTopology(num_pp=2, num_dp=2)
    net = PipelineModule(layers=layers(), topology=topology, loss_fn=loss_fn, seed_layers=True)
    grid = net.mpu()
    assert isinstance(grid, PipelineParallelGrid) and net.topology() is topology
    rank = dist.get_rank()
    assert (grid.get_stage_id(), grid.get_data_parallel_rank()) == (rank // 2, rank % 2)
    assert grid.get_model_parallel_world_size() == 2 and grid.get_slice_parallel_world_size() == 1
    assert grid.stage_to_global(1) == 2 + rank % 2 and net.num_pipeline_stages() == 2

    settings = {k: v for k, v in config(1).items() if k != "startup_summary"}
    engine, _, _, _ = deepspeed.initialize(
        model=net, config=settings, model_parameters=[p for p in net.parameters() if p.requires_grad]
    )
    assert isinstance(engine, PipelineEngine) and isinstance(engine, deepspeed.PipelineEngine)
    assert (
        engine.train_batch_size() == 2 * COUNT * 2 and engine.is_pipe_parallel() and engine.is_data_parallel()
    )
    assert engine.is_first_stage() == (rank < 2) and engine.is_last_stage() == (rank >= 2)
    losses = [engine.train_batch(data_iter=items(step, rank % 2, COUNT)).item() for step in range(4)]
    assert losses == pytest.approx(trained_alone(4, COUNT, 2, False, None)[0], rel=1e-5)
    loss, logits = engine.eval_batch(items(9, rank % 2, COUNT), return_logits=True)
    assert loss > 0 and (logits is None) == (rank < 2) and engine.global_steps == 4
    for call in (lambda: engine(torch.zeros(1)), lambda: engine.backward(loss), engine.step):
        with pytest.raises(PipelineError, match="Only train_batch"):
            call()
    engine.save_checkpoint(str(tmp_path))
    engine.load_checkpoint(str(tmp_path))
    engine.destroy()
