"""LoRA on the experts of a Hugging Face model by PEFT: adapters of a rank's own experts, without gathering them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_moe
import ds_zero
from engine.build.test_expert_section import mixtral
from harness import ranks

E, RANK = 4, 2


def with_adapters(ep_size: int) -> Any:
    """Mixtral with adapters, of which those of a rank are the parts of whole ones that belong to its experts."""
    from peft import LoraConfig, get_peft_model

    model = ds_moe.convert(mixtral(), ep_size=ep_size)
    options = LoraConfig(
        r=RANK, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=["q_proj"]
    )
    with warnings.catch_warnings():  # PEFT asks Transformers for an attribute by its old name
        warnings.simplefilter("ignore", FutureWarning)
        peft = get_peft_model(model, options)
    local = E // ep_size
    first = dist.get_rank() % ep_size * local
    generator = torch.Generator().manual_seed(4)
    for name, param in peft.named_parameters():
        if "lora_" not in name:
            continue
        factor = E // local if ".experts." in name else 1
        if "lora_A" in name:  # (experts x rank, in)
            whole = torch.randn(param.shape[0] * factor, param.shape[1], generator=generator) / 10
            part = (
                whole.view(E, RANK, -1)[first : first + local].reshape(param.shape) if factor > 1 else whole
            )
        else:  # (out, rank x experts)
            whole = torch.randn(param.shape[0], param.shape[1] * factor, generator=generator) / 10
            part = (
                whole.view(-1, RANK, E)[:, :, first : first + local].reshape(param.shape)
                if factor > 1
                else whole
            )
        param.data.copy_(part)
    return peft


def losses(model: Any, stage: int | None) -> list[float]:
    """Of two steps on the samples of all ranks; `stage` None: on one process without ZeRO."""
    mesh_for = ds_moe.expert_mesh(model) if stage is not None else None
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=5.0)
    world = dist.get_world_size()
    if stage is not None:
        ds_zero.shard(model, optimizer, stage, mesh_for=mesh_for)
    means = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 31, (world, 8), generator=generator)
        own = tokens if stage is None else tokens[dist.get_rank() :][:1]
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        means.append(mean.item() / world)
    return means


@ranks(2, groups_may_stay=True, timeout_s=240)
def test_adapters_of_divided_experts_train_as_on_one_process() -> None:
    pytest.importorskip("peft")
    plain = with_adapters(1)
    want = losses(plain, None)
    for ep_size, stage in ((2, 0), (2, 2), (2, 3)):
        model = with_adapters(ep_size)
        adapters = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and "lora_" in n)
        assert adapters * ep_size == sum(
            p.numel() for n, p in plain.named_parameters() if ".experts." in n and "lora_" in n
        )
        assert losses(model, stage) == pytest.approx(want, rel=1e-5), f"ep {ep_size} stage {stage}"
