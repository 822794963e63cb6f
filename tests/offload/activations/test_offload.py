"""ActivationOffload: gradients have the bits of training without it, and memory is where it should be."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ds_core import arena
from ds_layers import Checkpointing
from ds_offload import ActivationOffload, ActivationOptions, offload_activations
from ds_offload.activations.copies import copies_of
from offload.activations.late import LateCopies
from offload.activations.models import batch, gradients, net, same


@pytest.fixture(params=["cpu", "late", "nvme", "nvme late"])
def offload(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ActivationOffload]:
    options = ActivationOptions(
        device="nvme" if "nvme" in request.param else "cpu",
        nvme_path=tmp_path,
        min_bytes=512,
        in_flight_bytes=8192,
    )
    made = ActivationOffload(options, make_copies=LateCopies if "late" in request.param else copies_of)
    yield made
    made.close()


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(block, x, use_reentrant=True)
    return out


def not_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(block, x, use_reentrant=False)
    return out


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    "run",
    [None, not_reentrant, reentrant, Checkpointing()],
    ids=["whole", "not reentrant", "reentrant", "Checkpointing"],
)
def test_gradients_have_the_same_bits(offload: ActivationOffload, attached: bool, run: object) -> None:
    plain, moved = net(), net()
    if run is not None:
        plain.run = moved.run = run  # type: ignore[assignment]
    if attached:
        offload.attach(moved)
    for seed in range(3):
        assert same(
            gradients(plain, seed=seed), gradients(moved, nullcontext() if attached else offload, seed)
        )
    assert offload.statistics.moved_tensors >= 3 * 4
    assert offload.statistics.loaded_tensors == offload.statistics.moved_tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(offload: ActivationOffload, dtype: torch.dtype) -> None:
    def grads(around: object) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return gradients(model, around)  # type: ignore[arg-type]

    model = net()
    assert same(grads(None), grads(offload)) and offload.statistics.moved_tensors


def test_parameters_and_small_tensors_stay(offload: ActivationOffload) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    offload.attach(model)
    x = torch.randn(1, 64, requires_grad=True)  # 256 bytes; the weights have 16 KiB
    model(x).sum().backward()
    assert offload.statistics.moved_tensors == 0
    with torch.no_grad():
        alias = model[0].weight.detach().t()
    (x @ alias @ model[2].weight.t()).sum()
    model.register_forward_hook(lambda *_: (x @ alias).exp().sum())
    model(x)
    assert offload.statistics.moved_tensors == 0


def test_views_of_one_storage_are_moved_once(offload: ActivationOffload) -> None:
    w = torch.randn(32, 96, requires_grad=True)
    x = torch.randn(64, 32)
    out = []
    for around in (nullcontext(), offload):
        with around:
            q, k, v = (x @ w).chunk(3, -1)  # x is saved, and one storage of 24 KiB
            y = (q.exp() * k.t().contiguous().t().sin() * v * v).sum()
        out.append(torch.autograd.grad(y, w)[0])
    assert torch.equal(*out)
    storage = 64 * 96 * 4
    # x, the projection, and the results of exp, contiguous, sin and two products.
    assert offload.statistics.moved_bytes <= storage + 64 * 32 * 4 * 6


def test_a_small_part_of_a_large_storage_is_moved_alone(offload: ActivationOffload) -> None:
    big = torch.randn(1000, 300, requires_grad=True).clone()
    with offload:
        y = big[100:103].exp().sin().sum()
    assert 0 < offload.statistics.moved_bytes <= 3 * (3 * 300 * 4)
    (got,) = torch.autograd.grad(y, big)
    expected = torch.zeros(1000, 300)
    part = big[100:103].detach()
    expected[100:103] = part.exp().cos() * part.exp()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["conj", "expanded", "bool", "strided", "channels_last", "complex"])
def test_layouts(offload: ActivationOffload, kind: str) -> None:
    def loss(w: Tensor) -> Tensor:
        if kind == "conj":
            return (torch.view_as_complex(w.view(64, 16, 2)).conj() ** 2).abs().sum()
        if kind == "complex":
            return torch.fft.fft(w).pow(2).abs().sum()
        if kind == "expanded":
            e = w.exp()[:, None].expand(64, 5, 32)
            return (e * e.sin()).sum()
        if kind == "bool":
            return torch.where(w > 0, w.exp(), w.sin()).sum()
        if kind == "strided":
            e = w.exp().t()[::2]
            return (e * e.sin()).sum()
        image = w.view(2, 4, 16, 16).exp().contiguous(memory_format=torch.channels_last)
        return nn.functional.conv2d(image, torch.ones(3, 4, 3, 3)).sin().sum()

    w = torch.randn(64, 32, requires_grad=True)
    (plain,) = torch.autograd.grad(loss(w), w)
    with offload:
        y = loss(w)
    assert offload.statistics.moved_tensors
    assert torch.equal(torch.autograd.grad(y, w)[0], plain)


def test_a_graph_that_is_retained_can_be_used_again(offload: ActivationOffload) -> None:
    model = net(dropout=0.0)
    with offload:
        loss = model(batch())
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    third = torch.autograd.grad(loss, list(model.parameters()))
    assert same(list(first), list(second)) and same(list(second), list(third))
    assert offload.statistics.loaded_tensors == 3 * offload.statistics.moved_tensors


def test_double_backward(offload: ActivationOffload) -> None:
    def penalty(around: object) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Sigmoid())
        x = torch.randn(64, 32, requires_grad=True)
        with around:  # type: ignore[attr-defined]
            (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            loss = dx.square().sum()
        loss.backward()
        return [x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    assert same(penalty(nullcontext()), penalty(offload))
    assert offload.statistics.moved_tensors


def test_several_forwards_before_their_backwards(offload: ActivationOffload) -> None:
    model = net(dropout=0.0)
    expected = [gradients(model, seed=seed) for seed in range(3)]
    offload.attach(model)
    losses = [model(batch(seed)) for seed in range(3)]
    for seed in (1, 0, 2):
        model.zero_grad()
        losses[seed].backward()
        assert same([p.grad for p in model.parameters()], expected[seed])  # type: ignore[misc]


def test_an_error_in_forward_leaves_nothing_behind(offload: ActivationOffload) -> None:
    model = net(dropout=0.0)
    expected = gradients(model)
    offload.attach(model)

    def fail(*_: object) -> None:
        raise ValueError("broken")

    handle = model.blocks[2].up.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        model(batch())
    handle.remove()
    gc.collect()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert in_use(offload) == 0
    assert same(gradients(model), expected)
    assert in_use(offload) == 0


def test_without_a_backward_nothing_stays(offload: ActivationOffload) -> None:
    model = net(layers=2)
    offload.attach(model)
    for _ in range(3):
        loss = model(batch())
        assert in_use(offload) > 0
        del loss
        gc.collect()
        assert in_use(offload) == 0


def test_an_error_in_backward_frees_with_the_graph(offload: ActivationOffload) -> None:
    model = net(layers=3, dropout=0.0)
    expected = gradients(model)
    offload.attach(model)

    def fail(_: Tensor) -> None:
        raise ValueError("broken")

    handle = model.blocks[1].up.weight.register_hook(fail)
    loss = model(batch())
    with pytest.raises(ValueError, match="broken"):
        loss.backward()
    handle.remove()
    del loss
    assert same(gradients(model), expected)  # torch keeps the graph of a failed backward until the next one
    gc.collect()
    assert in_use(offload) == 0


def in_use(offload: ActivationOffload) -> int:
    """Bytes of host memory, or of the disk, that hold moved tensors."""
    return sum(place.in_use_bytes for place in offload._places.values())


def test_output_that_is_saved_makes_no_cycle() -> None:
    offload = ActivationOffload(ActivationOptions(min_bytes=1 << 30))
    with offload:
        x = torch.randn(4, 4, requires_grad=True)
        y = x.exp()
    storage = StorageWeakRef(y.untyped_storage())
    gc.disable()
    try:
        del y
        assert storage.expired()
    finally:
        gc.enable()


def test_a_kept_tensor_that_was_changed_in_place_is_an_error() -> None:
    offload = ActivationOffload(ActivationOptions(min_bytes=1 << 30))
    with offload:
        y = torch.randn(4, 4, requires_grad=True).exp()
    z = y.sum()
    y.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(4, 4\), saved for backward, was changed in place"):
        z.backward()


@pytest.mark.parametrize("late", [False, True])
def test_a_moved_tensor_that_is_changed_in_place_has_its_old_values_or_is_an_error(late: bool) -> None:
    offload = ActivationOffload(ActivationOptions(min_bytes=0), make_copies=LateCopies if late else copies_of)
    x = torch.randn(4, 4, requires_grad=True)
    with offload:
        y = x.exp()
        expected = y.detach().clone()
        y.add_(1)
        z = y.sin()  # saves y again, with other values
    if late:
        with pytest.raises(RuntimeError, match="while it was copied to the host"):
            z.sum().backward()
    else:
        z.sum().backward()
        assert torch.equal(x.grad, (expected + 1).cos() * expected)  # type: ignore[arg-type]


def test_memory_of_a_storage_that_is_reused_is_not_mistaken_for_the_old_one(
    offload: ActivationOffload,
) -> None:
    w = torch.ones(64, 64, requires_grad=True)
    with offload:
        total = sum((w * torch.full((64, 64), float(i))).sum() for i in range(20))
    (grad,) = torch.autograd.grad(total, w)
    assert torch.equal(grad, torch.full((64, 64), float(sum(range(20)))))


def test_the_next_tensors_are_on_their_way_before_they_are_asked_for() -> None:
    for options in ({}, {"prefetch_bytes": 1 << 20}):
        offload = ActivationOffload(ActivationOptions(min_bytes=512, **options))
        model = net()
        offload.attach(model)
        gradients(model)
        offload.detach()
        assert offload.statistics.late_tensors == 1, "all but the first are read ahead"
    offload = ActivationOffload(ActivationOptions(min_bytes=512, prefetch_bytes=0))
    gradients(model, offload)
    assert offload.statistics.late_tensors > 20


def test_only_the_chosen_layers_are_moved() -> None:
    one, all_of_them, first = (ActivationOffload(ActivationOptions(min_bytes=512)) for _ in range(3))
    model = net()
    expected = gradients(model)
    one.attach(model, ["blocks.0"])
    assert same(gradients(model), expected)
    one.detach()
    first.attach(model, [model.blocks[0], model.blocks[1]])
    gradients(model)
    first.detach()
    all_of_them.attach(model)
    gradients(model)
    assert 0 < one.statistics.moved_bytes < first.statistics.moved_bytes < all_of_them.statistics.moved_bytes
    assert first.statistics.moved_bytes == pytest.approx(2 * one.statistics.moved_bytes, rel=0.1)
    with pytest.raises(ValueError, match=r"Net has no submodule 'blocks.9'. Its layers are 'blocks.0', "):
        one.attach(model, ["blocks.9"])


def test_with_a_budget_the_last_tensors_stay() -> None:
    whole = ActivationOffload(ActivationOptions(min_bytes=512))
    model = net()
    gradients(model, whole)
    total = whole.statistics.moved_bytes
    offload = ActivationOffload(ActivationOptions(min_bytes=512, budget_bytes=total // 2))
    expected = gradients(model)
    assert same(gradients(model, offload), expected)
    assert offload.statistics.kept_bytes == 0, "in the first forward it is not known which the last ones are"
    assert same(gradients(model, offload), expected)
    assert 0.35 * total < offload.statistics.kept_bytes <= total // 2
    assert offload.statistics.moved_bytes + offload.statistics.kept_bytes == 2 * total
    late = offload.statistics.late_tensors
    gradients(model, offload)
    assert offload.statistics.late_tensors == late, "those before the kept ones were not read ahead"


def test_with_a_limit_of_host_memory_the_rest_stays() -> None:
    offload = ActivationOffload(ActivationOptions(min_bytes=512, max_host_bytes=100_000))
    model = net()
    assert same(gradients(model), gradients(model, offload))
    assert 0 < offload.statistics.moved_bytes <= 100_000 < offload.statistics.kept_bytes


def test_host_memory_is_reused() -> None:
    gc.collect()
    start = arena.stats().in_use_bytes
    offload = ActivationOffload(ActivationOptions(min_bytes=512))
    model = net()
    gradients(model, offload)
    before = arena.stats().in_use_bytes - start
    for seed in range(3):
        gradients(model, offload, seed)
    assert arena.stats().in_use_bytes - start == before
    model.zero_grad()
    with offload:
        loss = model(batch(tokens=31))
    loss.backward()
    assert arena.stats().in_use_bytes - start <= before * 31 / 16 * 1.1, "buffers of other sizes were kept"
    offload.close()
    assert arena.stats().in_use_bytes == start


def test_offload_activations_detaches_at_the_end() -> None:
    model = net()
    expected = gradients(model)
    with offload_activations(model, options=ActivationOptions(min_bytes=512)) as offload:
        assert same(gradients(model), expected)
    moved = offload.statistics.moved_tensors
    assert moved and same(gradients(model), expected) and offload.statistics.moved_tensors == moved
    with pytest.raises(ValueError, match="this ActivationOffload is closed"), offload:
        pass


def test_no_grad_and_inference_mode(offload: ActivationOffload) -> None:
    model = net().eval()
    offload.attach(model)
    with torch.no_grad():
        a = model(batch())
    with torch.inference_mode():
        b = model(batch())
    assert torch.equal(a, b) and not offload.statistics.moved_tensors


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="nvme_path"):
        ActivationOptions(device="nvme")
    with pytest.raises(ValueError, match="device='cuda'"):
        ActivationOptions(device="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="budget_bytes=-1"):
        ActivationOptions(budget_bytes=-1)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
def test_compiled(backend: str) -> None:
    plain, moved = net(dropout=0.0), net(dropout=0.0)
    expected = gradients(torch.compile(plain, backend=backend))
    offload = ActivationOffload(ActivationOptions(min_bytes=512))
    offload.attach(moved)
    assert same(gradients(torch.compile(moved, backend=backend)), expected)
    assert offload.statistics.moved_tensors
