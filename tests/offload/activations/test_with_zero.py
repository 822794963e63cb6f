"""Activations are moved under every ZeRO stage; parameters of stage 3, which are gathered for backward, are not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import ds_zero
from ds_offload import ActivationOffload, ActivationOptions
from ds_offload.activations.copies import copies_of
from harness import ranks
from offload.activations.late import LateCopies
from offload.activations.models import Block


class Hidden(nn.Module):
    """Blocks with a second loss that is no output, so that no hook on outputs sees its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(HiddenBlock(32, dropout=0.0) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()

    def extra(self) -> Tensor:
        return torch.stack([block.extra for block in self.blocks]).sum()  # type: ignore[misc]


class HiddenBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.extra = (self.up.weight @ self.down.weight).square().mean() + F.linear(x, self.up.weight).mean()
        return y


def train(
    stage: int, offload: ActivationOffload | None, *, attach_first: bool, only_hidden: bool
) -> Sequence[Tensor]:
    torch.manual_seed(0)
    model = Hidden()
    if offload is not None and attach_first:
        offload.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    config = ds_zero.ZeroConfig(
        persistence_threshold_numel=20, reduce_bucket_numel=3000, param_dtype=torch.bfloat16
    )
    ds_zero.shard(model, optimizer, stage, config=config)
    if offload is not None and not attach_first:
        offload.attach(model)
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = model(torch.randn(4, 8, 32, generator=generator).bfloat16())
        if only_hidden:
            model.extra().backward(retain_graph=True)
            loss.backward()
        else:
            (loss + model.extra()).backward()
        optimizer.step()
        optimizer.zero_grad()
    result = list(ds_zero.full_state_dict(model).values())
    ds_zero.destroy(model)
    return result


@ranks(2)
@pytest.mark.parametrize("stage", [2, 3])
def test_training_has_the_same_bits(stage: int) -> None:
    for only_hidden in (False, True):
        expected = train(stage, None, attach_first=False, only_hidden=only_hidden)
        offload = ActivationOffload(
            ActivationOptions(min_bytes=512), make_copies=LateCopies if only_hidden else copies_of
        )
        got = train(stage, offload, attach_first=only_hidden, only_hidden=only_hidden)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert offload.statistics.moved_bytes == 4 * bytes_without_zero(), "parameters were moved, too"


def bytes_without_zero() -> int:
    """Bytes that one forward of the unsharded model moves."""
    model = Hidden().bfloat16()
    offload = ActivationOffload(ActivationOptions(min_bytes=512))
    offload.attach(model)
    model(torch.zeros(4, 8, 32).bfloat16())
    return offload.statistics.moved_bytes
