"""The GPU kernels: the CPU's bits. Runs through ci/gpu on a machine with a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from ds_core import _gpu, codes, kernels, optim, row_sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = [1, 17, 0, 4096, 100_003, *([33] * 40)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _library() -> None:
    assert _gpu.is_live(), _gpu.library().reason


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "num_states", "options"),
    [
        (
            "adam_step",
            2,
            {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1},
        ),
        ("adagrad_step", 1, {"step": 3, "lr": 1e-2, "lr_decay": 0.1, "weight_decay": 0.1}),
        ("lion_step", 1, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}),
        ("sgd_step", 1, {"first": False, "lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (
            "lamb_step",
            2,
            {"step": 3, "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.1},
        ),
    ],
)
def test_updates(name: str, num_states: int, options: dict[str, float], state: torch.dtype) -> None:
    for grad, out in itertools.product(FLOATS, FLOATS):
        params = [torch.randn(n) for n in SIZES]
        states = [[(torch.rand(n) * 0.01).to(state) for n in SIZES] for _ in range(num_states)]
        grads = [torch.randn(n).to(grad) for n in SIZES]
        copies = [torch.zeros(n, dtype=out) for n in SIZES]
        lists = [params, *states, grads, copies]
        on_gpu = [[t.cuda() for t in tensors] for tensors in lists]
        kernel = getattr(kernels, name)
        kernel(*lists[:-1], grad_scale=0.3, out=copies, **options)
        kernel(*on_gpu[:-1], grad_scale=0.3, out=on_gpu[-1], **options)
        for cpu, gpu in zip(itertools.chain(*lists), itertools.chain(*on_gpu), strict=True):
            assert torch.equal(cpu, gpu.cpu())


@pytest.mark.parametrize("dtype", FLOATS)
def test_reductions(dtype: torch.dtype) -> None:
    tensors = [torch.randn(n).to(dtype) for n in SIZES]
    assert kernels.squared_norm([t.cuda() for t in tensors]) == kernels.squared_norm(tensors)
    x = tensors[4]
    assert torch.equal(kernels.squared_norm_blocks(x.cuda(), 77).cpu(), kernels.squared_norm_blocks(x, 77))
    bits, scale = kernels.pack_signs(x.cuda())
    expected_bits, expected_scale = kernels.pack_signs(x)
    assert torch.equal(bits.cpu(), expected_bits)
    assert scale == expected_scale
    assert torch.equal(kernels.unpack_signs(bits, scale, torch.empty_like(x, device="cuda")).cpu(),
                       kernels.unpack_signs(expected_bits, scale, torch.empty_like(x)))  # fmt: skip
    for target in FLOATS:
        cpu, gpu = torch.empty(x.numel(), dtype=target), torch.empty(x.numel(), dtype=target, device="cuda")
        kernels.cast(x, cpu)
        kernels.cast(x.cuda(), gpu)
        assert torch.equal(cpu, gpu.cpu())


def test_errors_name_the_device() -> None:
    x, y = torch.randn(4).cuda(), torch.randn(4)
    with pytest.raises(
        ValueError, match=r"dst\[0\] is on the CPU, but the arguments before it are on cuda:0"
    ):
        kernels.cast(x, y)


def test_the_current_stream_is_used() -> None:
    x = torch.ones(1 << 22, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x.mul_(3.0)
        norm, _ = kernels.squared_norm([x])
    assert norm == 9.0 * (1 << 22)


def test_fused_adam_steps_both_devices() -> None:
    params = [torch.nn.Parameter(torch.randn(1000)), torch.nn.Parameter(torch.randn(1000, device="cuda"))]
    params[1].data.copy_(params[0].data)
    optimizer = optim.FusedAdam(params, lr=0.1)
    for _ in range(3):
        params[0].grad = torch.randn(1000)
        params[1].grad = params[0].grad.cuda()
        optimizer.step()
    assert torch.equal(params[0], params[1].cpu())


@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes(dtype: torch.dtype, kept: torch.dtype | None) -> None:
    rows = [(0, 4096), (4096, 17), (4128, 8), (4136, 1), (4144, 1000), (5200, 255)]
    blocks, x = torch.tensor(rows), torch.randn(5500).to(dtype)
    for bits, seed in itertools.product((1, 4, 8), (None, 2**63 + 5)):
        found = []
        for device in ("cpu", "cuda"):
            residual = None if kept is None else torch.linspace(-5, 5, 5500).to(device, kept)
            scales = torch.zeros(len(rows), device=device)
            packed = torch.zeros(-(-5500 * bits // 8), dtype=torch.uint8, device=device)
            out = torch.linspace(-2, 2, 5500).to(device, dtype)
            if bits == 1:
                codes.sign_encode(x.to(device), blocks, scales, packed, residual)
                codes.sign_decode(scales, packed, blocks, out, weight=0.3, add=True)
            else:
                codes.int_encode(x.to(device), blocks, scales, packed, residual, bits=bits, seed=seed)
                codes.int_decode(scales, packed, blocks, out, bits=bits, weight=0.3, add=True)
            found.append([t.cpu() for t in (scales, packed, out, residual) if t is not None])
        for cpu, gpu in zip(*found, strict=True):
            assert torch.equal(cpu, gpu)


@pytest.mark.parametrize("dtype", FLOATS)
def test_row_sums(dtype: torch.dtype) -> None:
    index = torch.randperm(300)[:280].view(70, 4)
    index[index >= 250] = 250  # dropped
    rows, weights, grad = (torch.randn(s).to(dtype) for s in ((250, 64), (70, 4), (70, 64)))
    on_gpu = [x.cuda() for x in (rows, index, weights, grad)]
    wide = [x.float() for x in (rows, weights, grad)]
    expected = row_sums.reference(wide[0], index, wide[1])
    out = row_sums.forward(*on_gpu[:3])
    torch.testing.assert_close(out.cpu(), expected.to(dtype))
    d_rows, d_weights = row_sums.backward(on_gpu[3], *on_gpu[:3])
    used = index[index < 250]
    of_rows, of_weights = row_sums.backward(wide[2], wide[0], index, wide[1])
    torch.testing.assert_close(d_rows.cpu()[used], of_rows[used].to(dtype))
    torch.testing.assert_close(d_weights.cpu(), of_weights.to(dtype), rtol=2e-2, atol=2e-2)
