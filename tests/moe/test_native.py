"""Experts by the native kernels of ds_core: the same training as the loop, and used where they apply only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import ds_moe
from ds_moe import native
from ds_moe.experts import native_feed_forward

pytest.importorskip("ds_core")


class Squared(nn.Module):
    """An expert of another kind, for which only the products are native."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).square())  # type: ignore[no-any-return]


def layer_of(by: str, expert: Callable[[], nn.Module], **arguments: object) -> ds_moe.MoE:
    torch.manual_seed(0)
    return ds_moe.MoE(16, expert, num_experts=4, experts_by=by, **arguments)  # type: ignore[arg-type]


def stepped(layer: ds_moe.MoE, x: Tensor) -> list[Tensor]:
    """The output and all gradients, those of experts in their order."""
    x = x.clone().requires_grad_()
    out, aux, _ = layer(x)
    (out.float().square().sum() + aux).backward()
    grads: dict[str, list[Tensor]] = {}
    for name, param in layer.named_parameters():
        assert param.grad is not None
        parts = name.split(".")
        if parts[1] == "experts":
            grads.setdefault(".".join(parts[3:]), []).append(param.grad)
        else:
            grads[name.replace("experts.expert.", "")] = [param.grad]
    stacked = [torch.stack(g) if len(g) > 1 else g[0] for _, g in sorted(grads.items())]
    return [out, x.grad, *stacked]  # type: ignore[list-item]


@contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """Counts the calls of a native operation."""
    module = {
        "fused": native.grouped_feed_forward(),
        "products": native.grouped(),
        "sums": native.row_sums(),
    }[name]
    calls: list[int] = []
    forward = module.forward  # type: ignore[union-attr]

    def count(*args: object) -> object:
        calls.append(1)
        return forward(*args)

    with mock.patch.object(module, "forward", count):
        yield calls


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("drop", [False, True])
def test_steps_are_those_of_the_loop(k: int, drop: bool) -> None:
    x = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(1))
    arguments = {"k": k, "drop_tokens": drop, "use_rts": False, "top2_2nd_expert_sampling": False}
    for expert, what in (
        (lambda: ds_moe.FeedForward(16, 32), "fused"),
        (lambda: ds_moe.FeedForward(16, 32, activation="silu", gated=True, bias=False), "fused"),
        (Squared, "products"),
    ):
        with counted(what) as calls, counted("sums") as sums:
            got = stepped(layer_of("grouped", expert, **arguments), x)
        assert calls and sums
        want = stepped(layer_of("loop", expert, **arguments), x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        with mock.patch.multiple(
            native, grouped=lambda: None, grouped_feed_forward=lambda: None, row_sums=lambda: None
        ):
            torch.testing.assert_close(
                stepped(layer_of("grouped", expert, **arguments), x), want, rtol=1e-5, atol=1e-5
            )


def test_fused_blocks_give_way_to_hooks_adapters_and_frozen_weights() -> None:
    x = torch.randn(33, 16)
    layer = layer_of("grouped", lambda: ds_moe.FeedForward(16, 32), drop_tokens=False)
    want = layer(x)[0]
    seen: list[int] = []
    hooked, frozen, other = copy.deepcopy(layer), copy.deepcopy(layer), copy.deepcopy(layer)
    hooked.experts.expert.up.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    frozen.experts.expert.up.weight.requires_grad_(False)  # type: ignore[union-attr]

    class Adapted(type(other.experts.expert.down)):  # type: ignore[misc]
        pass

    other.experts.expert.down.__class__ = Adapted  # type: ignore[union-attr]
    for changed in (hooked, frozen, other):
        with counted("fused") as fused, counted("products") as products:
            out = changed(x)[0]
        assert not fused and len(products) == 2
        torch.testing.assert_close(out, want)
    assert seen == [1]
    out.sum().backward()
    frozen(x)[0].sum().backward()
    assert frozen.experts.expert.up.weight.grad is None  # type: ignore[union-attr]
    assert frozen.experts.expert.up.bias.grad is not None  # type: ignore[union-attr]
    with torch.no_grad():
        assert native_feed_forward.applies(frozen.experts.expert, torch.float32, 33)  # type: ignore[union-attr]


def test_autocast_computes_in_its_dtype() -> None:
    layer = layer_of("grouped", lambda: ds_moe.FeedForward(16, 32), drop_tokens=False)
    loop = layer_of("loop", lambda: ds_moe.FeedForward(16, 32), drop_tokens=False)
    x = torch.randn(33, 16)
    with torch.autocast("cpu", torch.bfloat16), counted("fused") as calls:
        got, want = layer(x)[0], loop(x)[0]
    assert calls
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    got.sum().backward()
    assert layer.experts.expert.up.weight.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_large_products_in_bf16_are_left_to_torch() -> None:
    weight = torch.empty(2, 2048, 2048, device="cpu", dtype=torch.bfloat16)
    grouped = native.grouped()
    assert grouped is not None
    assert grouped.is_faster(1, torch.bfloat16, weight)
    assert not grouped.is_faster(64, torch.bfloat16, weight)
    assert grouped.is_faster(64, torch.float32, weight) == (
        torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    )
