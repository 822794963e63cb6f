"""The section `expert_parallel`: experts of Hugging Face models among ranks, beside tensor parallelism, and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_engine
import ds_moe
from compose.jobs import language_model, tokens_of
from ds_engine.config import ConfigError
from ds_layers.tensor import cut_of
from harness import ranks

STEPS, SAMPLES = 3, 4


def mixtral() -> Any:
    import transformers as hf

    torch.manual_seed(2)
    config = hf.MixtralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return hf.MixtralForCausalLM(config)


def config(stage: int = 1, tensor: int = 1, **experts: Any) -> dict[str, Any]:
    return {
        "train_batch_size": SAMPLES,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": tensor},
        "expert_parallel": {"enabled": True, **experts},
        "startup_summary": False,
    }


def reference(model: nn.Module, steps: int = STEPS) -> list[float]:
    """The losses of plain PyTorch on one process."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        tokens = tokens_of(step, range(SAMPLES))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(engine: ds_engine.Engine, first: int = 0, last: int = STEPS) -> list[float]:
    losses = []
    data = engine.topology.samples
    own = range(data.index * SAMPLES // data.size, (data.index + 1) * SAMPLES // data.size)
    for step in range(first, last):
        tokens = tokens_of(step, own)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


CASES: tuple[dict[str, Any], ...] = (
    {"autoep_size": 4, "stage": 3},
    {"autoep_size": 4, "stage": 2, "all_to_all": "hierarchical", "ranks_per_machine": 2},
    {"autoep_size": 2, "tensor": 2, "stage": 1},
    {"autoep_size": 2, "tensor": 2, "stage": 3, "expert_tensor_parallel_size": 2},
    {"autoep_size": 1, "tensor": 2, "stage": 0, "expert_tensor_parallel_size": 2},
)


@ranks(4, groups_may_stay=True, timeout_s=200)
def test_losses_are_those_of_one_process(tmp_path: Path) -> None:
    want = reference(mixtral(), STEPS + 1)
    whole = sum(p.numel() for n, p in mixtral().named_parameters() if ".experts." in n)
    for case in CASES:
        model = mixtral()
        passed = torch.optim.AdamW(model.parameters(), lr=0.01)  # parameters stay the same objects
        settings = config(**case)
        del settings["optimizer"]
        engine, *_ = ds_engine.initialize(model, settings, optimizer=passed)
        assert trained(engine) == pytest.approx(want[:STEPS], rel=1e-5), case
        experts = [(n, p) for n, p in engine.module.named_parameters() if ".experts." in n]
        parts = case["autoep_size"] * case.get("expert_tensor_parallel_size", 1)
        assert sum(p.numel() for _, p in experts) == whole // parts
        assert all((cut_of(n, p) is not None) == ("expert_tensor_parallel_size" in case) for n, p in experts)
        (first, *_) = ds_moe.reports(engine.module)
        assert (first.sent_bytes > 0) == (case["autoep_size"] > 1)
        if case is CASES[3]:
            engine.save_checkpoint(str(tmp_path / "saved"))
        engine.destroy()
    # Experts in parts of two ranks, in pairs of experts: loaded with whole experts on four ranks.
    for case in (CASES[0], CASES[4]):
        engine, *_ = ds_engine.initialize(mixtral(), config(**case))
        engine.load_checkpoint(str(tmp_path / "saved"))
        assert trained(engine, STEPS, STEPS + 1) == pytest.approx(want[STEPS:], rel=1e-5), case
        engine.destroy()


@ranks(4, groups_may_stay=True)
def test_encoded_tokens_train_nearly_as_well() -> None:
    want = reference(mixtral())
    engine, *_ = ds_engine.initialize(mixtral(), config(autoep_size=4, all_to_all_bits=8))
    assert trained(engine) == pytest.approx(want, rel=5e-3)
    sent = [report.sent_bytes for report in ds_moe.reports(engine.module)]
    engine.destroy()
    plain, *_ = ds_engine.initialize(mixtral(), config(autoep_size=4))
    trained(plain)
    bytes_in_fp32 = [report.sent_bytes for report in ds_moe.reports(plain.module)]
    plain.destroy()
    # 16 elements in fp32, or in 8 bits with a scale; a few tokens choose other experts.
    assert sum(sent) / sum(bytes_in_fp32) == pytest.approx(20 / 64, rel=0.05)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@ranks(2, groups_may_stay=True)
def test_what_does_not_fit_is_refused() -> None:
    def refused(model: nn.Module, message: str, **settings: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            ds_engine.initialize(model, config(**settings))

    refused(Dense(), "expert_parallel: Dense: no module with stacked experts", autoep_size=2)
    refused(mixtral(), "ep_size=4 must divide the 2 ranks", autoep_size=4)
    refused(
        mixtral(),
        "expert_tensor_parallel_size is 2, and 1 ranks share each layer",
        expert_tensor_parallel_size=2,
    )
    refused(language_model(2), "the model has layers of ds_moe, with ep_size 2: remove it", autoep_size=2)
    refused(mixtral(), "ep_size=2 must divide the data axis.* with 1 ranks", autoep_size=2, tensor=2)
    refused(mixtral(), "expert_parallel.top_k is 2: .*routers other than the model's own", top_k=2)
    stacked = language_model(1)
    stacked.model.layers[1].mlp.moe = ds_moe.MoE(  # type: ignore[union-attr]
        16, lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU()), 4, enable_expert_tensor_parallelism=True
    )
    refused(stacked, "experts Sequential cannot be cut among tensor-parallel ranks", tensor=2)


@ranks(2, groups_may_stay=True)
def test_cut_experts_compute_what_whole_ones_do() -> None:
    """With biases, which are added once; by native kernels and by torch."""
    from ds_layers.tensor import keep_part

    group = dist.group.WORLD
    assert group is not None
    for hidden, inner in ((16, 32), (6, 10)):
        layers = []
        for _ in range(2):
            torch.manual_seed(1)
            layers.append(
                ds_moe.MoE(hidden, lambda h=hidden, i=inner: ds_moe.FeedForward(h, i, gated=True), 3, k=1)
            )
        whole, cut = layers
        for name, (dim, sections) in cut.tensor_dims().items():
            keep_part(dict(cut.named_parameters())[name], group, dim, sections=sections, whole_length=3)
        cut.divide(group)
        cut.eval(), whole.eval()
        x = torch.randn(20, hidden, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = x.detach().clone().requires_grad_()
        want, got = whole(x)[0], cut(y)[0]
        torch.testing.assert_close(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(y.grad, x.grad)
        for (name, one), other in zip(cut.named_parameters(), whole.parameters(), strict=True):
            part = cut_of(name, one)
            torch.testing.assert_close(
                one.grad, other.grad if part is None else part.of(other.grad), msg=name
            )
