"""`deepspeed.init_inference` as scripts call it."""

from __future__ import annotations

import pytest
import torch
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.engine import InferenceEngine
from torch import nn

import deepspeed
from harness import ranks


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_the_original_s_default_is_half_precision() -> None:
    engine = deepspeed.init_inference(net())
    assert isinstance(engine, InferenceEngine) and isinstance(engine.module, nn.Sequential)
    assert {p.dtype for p in engine.parameters()} == {torch.float16}
    assert deepspeed.default_inference_config()["dtype"] == torch.float16
    assert DeepSpeedInferenceConfig(tp={"tp_size": 2}).tensor_parallel.tp_size == 2
    with pytest.raises(ValueError, match="expected string or dictionary"):
        deepspeed.init_inference(net(), config=3)


@ranks(2)
def test_stage_3_answers_as_a_whole_model() -> None:
    x = torch.ones(2, 8)
    with deepspeed.zero.Init():
        model = net()
    with pytest.warns(UserWarning, match="replace_with_kernel_inject: it has no effect"):
        engine = deepspeed.init_inference(model, dtype=torch.float32, replace_with_kernel_inject=True)
    assert torch.equal(engine(x), net()(x))
    engine = deepspeed.init_inference(net(), {"dtype": torch.float}, mp_size=2)
    assert torch.equal(engine.forward(x), net()(x)) and not engine(x).requires_grad


class Speaker(nn.Linear):
    """Says a word a step, as transformers' models do: all ranks as long as one still speaks, if they are told to."""

    def generate(self, x: torch.Tensor, steps: int, synced_gpus: bool | None = None) -> torch.Tensor:
        for step in range(100):
            going = torch.tensor([max(0, steps - step)])
            if synced_gpus:
                torch.distributed.all_reduce(going)
            if not going:
                break
            word = self(x)
            x = word if step < steps else x
        return x


@ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_that_trains_generates_at_different_lengths(stage: int) -> None:
    torch.manual_seed(0)
    model, reference = Speaker(4, 4), Speaker(4, 4)
    reference.load_state_dict(model.state_dict())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "startup_summary": False,
    }
    engine, *_ = deepspeed.initialize(model=model, config=config)
    steps = 2 + 3 * torch.distributed.get_rank()
    with torch.no_grad():
        x = torch.ones(1, 4)
        expected = reference.generate(x, steps)
        engine.eval()
        assert torch.equal(engine.generate(x, steps), expected)
