"""Parameters and states that are not fp32: the kernels against the reference, and what the formats promise."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_core import formats, kernels, reference
from ds_core.formats import StepFormats

SIZES = (1, 7, 8, 31, 32, 33, 40, 512, 543, 0, 4096, 70_007)
ADAM = {"step": 3, "lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "adam_step": (2, ADAM),
    "adagrad_step": (1, {"step": 5, "lr": 1e-2, "weight_decay": 0.1}),
    "lion_step": (1, {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1}),
    "sgd_step": (1, {"first": False, "lr": 0.1, "momentum": 0.9, "nesterov": True}),
}


def _bits(x: Tensor) -> Tensor:
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}.get(x.dtype)
    return x if kind is None else torch.where(x.isnan(), torch.full_like(x, float("nan")), x).view(kind)


def _wide(n: int) -> Tensor:
    """Numbers whose sizes differ by many orders of magnitude, some of them 0."""
    x = torch.randn(n) * torch.exp(3 * torch.randn(n))
    return x * (torch.rand(n) > 0.05)


class Job:
    """The tensors of one step."""

    def __init__(
        self, name: str, param: torch.dtype, state: torch.dtype, grad: torch.dtype, *, split: bool
    ) -> None:
        self.name = name
        self.count, self.options = OPTIONS[name]
        masters = [torch.randn(n) for n in SIZES]
        halves = [formats.split_master(x) for x in masters]
        self.params = [h for h, _ in halves] if split else [x.to(param) for x in masters]
        self.low = [low for _, low in halves] if split else None
        self.grads = [_wide(n).to(grad) for n in SIZES]
        moments = [[_wide(n) * 0.1 for n in SIZES], [_wide(n).square() for n in SIZES]]
        if state == torch.uint8:
            pairs = [formats.pack_moments(m, v, 5) for m, v in zip(*moments, strict=True)]
            self.states = [[m for m, _ in pairs], [v for _, v in pairs]]
        else:
            self.states = [[x.to(state).abs() for x in own] for own in moments[: self.count]]
        self.out: list[Tensor | None] = [None] * len(SIZES)

    def step(
        self,
        module: Any,
        rounding: int | None,
        *,
        away: bool = False,
        checksums: kernels.Checksums | None = None,
    ) -> None:
        step_formats = StepFormats(master_bits=self.low, rounding=rounding, copies_away=away)
        function = getattr(module, self.name)
        if module is reference:
            with formats.widened(self.params, self.states, self.out, step_formats) as (params, states, out):
                function(params, *states, self.grads, grad_scale=0.37, out=out, **self.options)
        else:
            function(self.params, *self.states, self.grads, grad_scale=0.37, out=self.out, formats=step_formats,
                     checksums=checksums, **self.options)  # fmt: skip

    def tensors(self) -> list[Tensor]:
        copies = [x for x in self.out if x is not None]
        return [*self.params, *itertools.chain(*self.states), *(self.low or []), *copies]


def _assert_same(a: Job, b: Job) -> None:
    for x, y in zip(a.tensors(), b.tensors(), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(_bits(x), _bits(y))


KINDS = [
    (torch.float32, torch.bfloat16, 7, False),
    (torch.float32, torch.uint8, 7, False),
    (torch.bfloat16, torch.float32, None, False),
    (torch.float16, torch.bfloat16, None, False),
    (torch.bfloat16, torch.bfloat16, 7, False),
    (torch.bfloat16, torch.float32, None, True),
    (torch.bfloat16, torch.bfloat16, 7, True),
    (torch.bfloat16, torch.uint8, 7, True),
]


CASES = [(name, *kind) for name in OPTIONS for kind in KINDS if kind[1] != torch.uint8 or name == "adam_step"]


@pytest.mark.parametrize(("name", "param", "state", "rounding", "split"), CASES)
def test_same_bits_as_the_reference(
    name: str, param: torch.dtype, state: torch.dtype, rounding: int | None, split: bool, target: str
) -> None:
    for grad, out in (
        (torch.float32, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ):
        job = Job(name, param, state, grad, split=split)
        job.out = [None if out is None else torch.empty(n, dtype=out) for n in SIZES]
        expected = copy.deepcopy(job)
        job.step(kernels, rounding)
        expected.step(reference, rounding)
        _assert_same(job, expected)


@pytest.mark.parametrize(("name", "param", "state", "rounding", "split"), CASES)
def test_checksums_in_the_pass_of_every_format(
    name: str, param: torch.dtype, state: torch.dtype, rounding: int | None, split: bool
) -> None:
    job = Job(name, param, state, torch.bfloat16, split=split)
    expected = copy.deepcopy(job)
    lists = [job.params, *job.states, *([job.low] if job.low is not None else [])]

    def sums() -> list[Tensor]:
        rows = [kernels.checksums([x.view(torch.bfloat16) if x.dtype == torch.int16 else x for x in own])
                for own in lists]  # fmt: skip
        return [torch.stack(of_one) for of_one in zip(*rows, strict=True)]

    before, of_grads = sums(), kernels.checksums(job.grads)
    read, written = ([torch.zeros(1 + len(row), row.shape[1], dtype=torch.int64) for row in before]
                     for _ in range(2))  # fmt: skip
    job.step(kernels, rounding, checksums=(read, written))
    expected.step(kernels, rounding)
    _assert_same(job, expected)  # checksums change no bit
    for own, row, grads in zip(read, before, of_grads, strict=True):
        assert torch.equal(own[1:], row) and torch.equal(own[0], grads)
    for own, row in zip(written, sums(), strict=True):
        assert torch.equal(own[1:], row) and not own[0].any()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-44])
@pytest.mark.parametrize(("param", "state", "rounding", "split"), KINDS)
def test_special_numbers_like_the_reference(
    special: float, param: torch.dtype, state: torch.dtype, rounding: int | None, split: bool, target: str
) -> None:
    job = Job("adam_step", param, state, torch.float32, split=split)
    for grad in job.grads:
        grad[::50] = special
    expected = copy.deepcopy(job)
    job.step(kernels, rounding)
    expected.step(reference, rounding)
    _assert_same(job, expected)


@pytest.mark.parametrize(("param", "state", "rounding", "split"), KINDS)
def test_threads_and_cuts_do_not_change_the_bits(
    param: torch.dtype, state: torch.dtype, rounding: int | None, split: bool
) -> None:
    whole = Job("adam_step", param, state, torch.bfloat16, split=split)
    parts = copy.deepcopy(whole)
    torch.set_num_threads(2)
    whole.step(kernels, rounding)
    torch.set_num_threads(1)
    cuts = [0, 32, 96, 4128, 69_984]

    def cut(tensors: list[Tensor]) -> list[Tensor]:
        return [
            x[a:b] for x in tensors for a, b in itertools.pairwise([c for c in cuts if c < len(x)] + [len(x)])
        ]

    pieces = copy.copy(parts)
    pieces.params, pieces.grads = cut(parts.params), cut(parts.grads)
    pieces.states = [cut(own) for own in parts.states]
    pieces.low = None if parts.low is None else cut(parts.low)
    pieces.out = [None] * len(pieces.params)
    pieces.step(kernels, rounding)
    _assert_same(whole, parts)


def test_the_error_of_8_bit_moments_is_within_the_bounds_of_the_docstring() -> None:
    n = 64 * 1024 + 7
    torch.manual_seed(3)
    v = torch.exp(6 * torch.randn(n)) * (torch.rand(n) > 0.1)
    m = 8 * v.sqrt() * torch.exp(-6 * torch.rand(n)) * torch.randn(n).sign()
    m8, v8 = formats.pack_moments(m, v, formats.rounding_key(1, 2))
    m_back, v_back = formats.unpack_moments(m8, v8)
    inside = slice(0, n - 7)
    top = v[inside].view(-1, 32).amax(1, keepdim=True).expand(-1, 32).reshape(-1)

    own, back = v[inside], v_back[inside]
    large = own >= 2.0**-30 * top
    assert ((back - own).abs() < own / 8)[large].all()
    assert ((back.sqrt() - own.sqrt()).abs() < own.sqrt() / 15)[large].all()
    assert (back <= 9 / 8 * 2.0**-30 * top)[~large].all() and (back > 0)[top > 0].all()

    own, back = m[inside], m_back[inside]
    size, root = own.abs(), top.sqrt()
    coarse = (torch.arange(n - 7) % 32) < 8
    large = (size >= 2.0**-11 * root) & (size <= 8 * root)
    assert ((back - own).abs() < size * torch.where(coarse, 1 / 4, 1 / 8))[large].all()
    assert ((back - own).abs() < 2.0**-11 * root)[size < 2.0**-11 * root].all()
    assert (back * own >= 0).all()

    for own, back in ((m[-7:], m_back[-7:]), (v[-7:], v_back[-7:])):
        assert ((back - own).abs() <= own.abs() / 2).all()


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_rounding_is_unbiased_over_elements_and_over_steps(kind: str) -> None:
    torch.manual_seed(4)
    v = torch.rand(32 * 2048) + 0.5
    m = torch.randn(len(v)).sign() * (torch.rand(len(v)) + 0.01)

    def rounded(key: int) -> tuple[Tensor, Tensor]:
        if kind == "int8":
            return formats.unpack_moments(*formats.pack_moments(m, v, key))
        return formats.round_stochastically(m, key).float(), formats.round_stochastically(
            v, key >> 32
        ).float()

    step = {"int8": 1 / 8, "bf16": 1 / 128}[kind]  # between two codes, as a part of the value
    for own, back in zip((m, v), rounded(formats.rounding_key(0, 1)), strict=True):
        error = (back - own) / own.abs().clamp_min(1e-6)
        assert abs(error.mean()) < 4 * 2 * step / len(v) ** 0.5
        assert error.abs().max() > step / 4  # it is not rounded to nearest by chance
    count = 400
    sums = torch.zeros(2, len(v), dtype=torch.float64)
    for number in range(count):
        for total, back in zip(sums, rounded(formats.rounding_key(0, number)), strict=True):
            total += back
    for own, total in zip((m, v), sums, strict=True):
        error = (total / count - own) / own.abs().clamp_min(1e-6)
        assert error.square().mean().sqrt() < 2 * step / count**0.5


def test_a_second_moment_decays_and_grows_as_in_fp32() -> None:
    """With round to nearest it would keep its first value: it changes by a thousandth in a step."""
    n = 32 * 512
    params = [torch.zeros(n) for _ in range(3)]
    dtypes = (torch.float32, torch.uint8, torch.bfloat16)
    states = [[torch.zeros(n, dtype=d) for _ in range(2)] for d in dtypes]
    options = {"lr": 0.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    generator = torch.Generator().manual_seed(5)

    def second_moments() -> list[float]:
        return [
            float(states[0][1].mean()),
            float(formats.unpack_moments(*states[1])[1].mean()),
            float(states[2][1].float().mean()),
        ]

    for step in range(1, 400):
        grad = torch.randn(n, generator=generator) * (1.0 if step < 200 else 0.1)
        key = StepFormats(rounding=formats.rounding_key(0, step))
        for param, own in zip(params, states, strict=True):
            kernels.adam_step([param], [own[0]], [own[1]], [grad], step=step, formats=key, **options)  # type: ignore[arg-type]
        if step in (199, 399):
            exact, *others = second_moments()
            assert all(abs(other / exact - 1) < 0.03 for other in others)


def test_split_masters_keep_every_bit() -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(1 << 15, dtype=torch.int64) << 16 | 0x8000).to(torch.int32)
    x = torch.cat([bits, ties]).view(torch.float32)
    high, low = formats.split_master(x)
    joined = formats.join_master(high, low)
    number = ~x.isnan()
    assert torch.equal(joined.view(torch.int32)[number], x.view(torch.int32)[number])
    assert high[~number].isnan().all() and joined[~number].isnan().all()
    finite = x.isfinite() & (x.abs() < 3e38)
    nearest = x[finite].bfloat16()
    farther = high[finite] != nearest
    assert torch.equal(
        (x[finite].view(torch.int32) & 0xFFFF)[farther].unique(), torch.tensor([0x8000], dtype=torch.int32)
    )
    assert (high[finite].float().abs() > nearest.float().abs())[farther].all()


def test_copies_of_fp32_masters_round_as_split_masters() -> None:
    torch.manual_seed(6)
    n = 4099
    wide, grad = torch.randn(n), torch.randn(n).bfloat16()
    wide = formats.join_master(*formats.split_master(wide))
    high, low = formats.split_master(wide)
    moments = [[torch.zeros(n), torch.zeros(n)] for _ in range(2)]
    copies = torch.empty(n, dtype=torch.bfloat16)
    for step in range(1, 6):
        options = {**ADAM, "step": step}
        kernels.adam_step([wide], *([x] for x in moments[0]), [grad], out=[copies],
                          formats=StepFormats(copies_away=True), **options)  # type: ignore[arg-type]  # fmt: skip
        kernels.adam_step([high], *([x] for x in moments[1]), [grad],
                          formats=StepFormats(master_bits=[low]), **options)  # type: ignore[arg-type]  # fmt: skip
        assert torch.equal(copies.view(torch.int16), high.view(torch.int16))


def test_arguments_that_do_not_fit_are_refused() -> None:
    p, g = torch.zeros(8), torch.zeros(8)
    codes = [torch.zeros(8, dtype=torch.uint8) for _ in range(2)]
    with pytest.raises(ValueError, match="rounding is None, but 8-bit states are rounded stochastically"):
        kernels.adam_step([p], [codes[0]], [codes[1]], [g], formats=StepFormats(), **ADAM)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] must be uint8, but is float32"):
        kernels.adam_step([p], [codes[0]], [g], [g], formats=StepFormats(rounding=1), **ADAM)  # type: ignore[arg-type]
    low = StepFormats(master_bits=[torch.zeros(8, dtype=torch.int16)])
    with pytest.raises(ValueError, match=r"params\[0\] must be bfloat16 if it has master_bits"):
        kernels.adam_step([p], [p.clone()], [p.clone()], [g], formats=low, **ADAM)  # type: ignore[arg-type]
