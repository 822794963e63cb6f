"""`initialize(mpu=...)`: data- and model-parallel groups from an object with Megatron's methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ds_engine
import ds_zero
from harness import ranks


class Mpu:
    """Two model-parallel by two data-parallel ranks."""

    def __init__(self) -> None:
        self.mesh: DeviceMesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))

    def get_data_parallel_group(self) -> Any:
        return self.mesh["data"].get_group()

    def get_data_parallel_rank(self) -> int:
        return self.mesh["data"].get_local_rank()

    def get_data_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_group(self) -> Any:
        return self.mesh["model"].get_group()

    def get_model_parallel_rank(self) -> int:
        return self.mesh["model"].get_local_rank()

    def get_model_parallel_world_size(self) -> int:
        return 2


class Part(nn.Module):
    """A column-cut layer, and a bias-like vector that both halves hold alike."""

    def __init__(self, index: int) -> None:
        super().__init__()
        whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
        self.weight = nn.Parameter(whole[4 * index : 4 * index + 4].clone())
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.alike = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).square().mean() + (self.alike * x[0, :3]).sum()


CONFIG = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "gradient_clipping": 1000.0,
    "startup_summary": False,
}


def data(rank: int) -> Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(rank))


@ranks(4, groups_may_stay=True)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradients_meet_over_data_and_norms_over_both(stage: int) -> None:
    mpu = Mpu()
    index = mpu.get_model_parallel_rank()
    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    engine, *_ = ds_engine.initialize(model=Part(index), config=config, mpu=mpu)
    assert engine.gradient_accumulation_steps() == 1, "four samples on two data-parallel ranks"
    engine.backward(engine(data(mpu.get_data_parallel_rank())))
    engine.step()

    parts = [Part(0), Part(1)]
    grads: list[list[Tensor]] = []
    for part in parts:
        both = [torch.autograd.grad(part(data(r)), list(part.parameters())) for r in range(2)]
        grads.append([(a + b) / 2 for a, b in zip(*both, strict=True)])
    expected = ds_zero.total_norm([grads[0][0], grads[1][0], grads[0][1]])
    assert engine.get_global_grad_norm() == pytest.approx(expected.item(), rel=1e-6)
    with ds_zero.gathered(list(engine.module.parameters())):
        for param, before, grad in zip(
            engine.module.parameters(), parts[index].parameters(), grads[index], strict=True
        ):
            torch.testing.assert_close(param.detach(), before.detach() - 0.1 * grad)
    engine.destroy()


@ranks(2)
def test_an_object_without_the_methods_is_refused() -> None:
    with pytest.raises(ValueError, match="object has no method get_data_parallel_group"):
        ds_engine.initialize(model=nn.Linear(2, 2), config=CONFIG, mpu=object())
    assert dist.is_initialized()
