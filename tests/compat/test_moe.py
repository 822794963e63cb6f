"""`deepspeed.moe` through `deepspeed.initialize`."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import (
    configure_moe_param_groups,
    has_moe_layers,
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
)
from torch import Tensor, nn

import deepspeed
from harness import ranks


class Net(nn.Module):
    """As in DeepSpeed's tutorial."""

    def __init__(self, ep_size: int, expert: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        made = expert or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.moe = MoE(8, made, num_experts=4, ep_size=ep_size, k=2, min_capacity=1, use_residual=True)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, l_aux, _ = self.moe(self.first(x))
        return self.last(out).square().mean() + 0.01 * l_aux


def test_names_in_state_dicts_and_back() -> None:
    model = Net(1)
    state = model.state_dict()
    assert "moe.deepspeed_moe.gate.wg.weight" in state and "moe.mlp.0.weight" in state
    inside = [n for n in state if n.startswith("moe.deepspeed_moe.experts.deepspeed_experts.")]
    assert len(inside) == 4 * 4 and "moe.deepspeed_moe.experts.deepspeed_experts.3.2.bias" in inside
    assert not any(".experts.expert." in n for n in state)
    changed = {n: v + 1 for n, v in state.items()}
    other = Net(1)
    other.load_state_dict(changed)
    for name, value in other.state_dict().items():
        assert torch.equal(value, changed[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({n: v for n, v in state.items() if ".deepspeed_experts.1." not in n})
    by_loop = Net(1, nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    names = by_loop.state_dict().keys()
    assert "moe.deepspeed_moe.experts.deepspeed_experts.3.1.weight" in names
    by_loop.load_state_dict(by_loop.state_dict())
    saved = model.state_dict()["moe.deepspeed_moe.experts.deepspeed_experts.1.0.weight"]
    assert saved.data_ptr() == model.moe.experts.expert_state(1)["0.weight"].data_ptr()  # views of the stack


def test_groups_of_experts() -> None:
    model = Net(1)
    assert has_moe_layers(model) == (True, 4) and has_moe_layers(model.first) == (False, 0)
    params = list(model.parameters())
    experts = [p for p in params if is_moe_param(p)]
    assert len(experts) == 4
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": params, "name": "all", "lr": 0.1}
    )
    assert [g.get("moe", False) for g in groups] == [False, True]
    assert groups[1]["name"] == "ep_size_1" and groups[1]["lr"] == 0.1
    assert [id(p) for p in groups[1]["params"]] == [id(p) for p in experts]
    assert len(split_params_into_different_moe_groups_for_optimizer(groups[:1], 10)) == 1
    cut = split_params_into_different_moe_groups_for_optimizer({"params": params, "name": "all"}, 600)
    assert [len(g["params"]) for g in cut[1:]] == [2, 2]
    assert len(configure_moe_param_groups(params)) == 2


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_trains_at_every_stage_with_groups_of_experts() -> None:
    losses = {}
    for stage in (0, 1, 2, 3):
        model = Net(2)
        groups = configure_moe_param_groups(model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.3,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": False},
        }
        engine, *_ = deepspeed.initialize(
            model=model, config=config, optimizer=torch.optim.AdamW(groups, lr=0.05, foreach=True)
        )
        history = []
        for step in range(8):
            seed = torch.Generator().manual_seed(10 * (step // 2) + dist.get_rank())
            torch.manual_seed(step)  # the second choice is sampled
            loss = engine(torch.randn(4, 8, generator=seed))
            engine.backward(loss)
            engine.step()
            history.append(loss.item())
        losses[stage] = history
        engine.destroy()
    assert losses[0][-1] < 0.7 * losses[0][0]
    for stage in (1, 2, 3):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-4)
