"""One training of the parity suite: by ds_zero, and by one process in plain PyTorch.

The reference stands for all ranks: it runs every rank's micro-batches itself, adds gradients in the order that the
accumulation plan names, keeps fp32 masters beside 16-bit parameters, and steps a whole optimizer. No collective and no
code of ds_zero is in it but the norm, whose exactness has tests of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import ds_zero
from ds_core.optim import FusedLamb
from zero.models import batch
from zero.parity import everywhere, world

FACTORS: Mapping[str, list[Any]] = {
    "stage": [0, 1, 2, 3],
    "ranks": [1, 2, 3, 4],
    "model": ["frozen", "tied", "unused", "uneven"],
    "dtype": ["fp32", "bf16", "fp16"],
    "optimizer": ["sgd", "adamw", "lamb"],
    "plan": ["local", "sharded"],
    "accumulation": [1, 3],
    "clip": [None, 0.05],
    "overlap": [True, False],
    "checkpointed": [False, True],
}
STEPS, LOSS_SCALE = 3, 256.0
DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def sgd(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=True)


def adamw(params: Iterable[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def lamb(params: Iterable[Tensor]) -> Optimizer:
    return FusedLamb(params, lr=1e-2, weight_decay=0.1)


OPTIMIZERS: Mapping[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "lamb": lamb,
}


class Layer(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Embedding, two layers, head; `kind` says what is awkward about it."""

    def __init__(self, kind: str, checkpointed: bool) -> None:
        super().__init__()
        dim, hidden = (7, 11) if kind == "uneven" else (8, 16)
        self.checkpointed = checkpointed
        self.embed = nn.Embedding(37, dim)
        self.layers = nn.ModuleList(Layer(dim, hidden) for _ in range(2))
        self.head = nn.Linear(dim, 37, bias=False)
        if kind == "tied":
            self.head.weight = self.embed.weight
        if kind == "frozen":
            self.layers[0].up.weight.requires_grad_(False)
            self.embed.weight.requires_grad_(False)
        if kind == "unused":
            self.unused = nn.Linear(dim, hidden)
        if kind == "uneven":
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        if hasattr(self, "scale"):
            x = x * self.scale
        return F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.flatten())


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination."""

    stage: int
    ranks: int
    model: str
    dtype: str
    optimizer: str
    plan: str
    accumulation: int
    clip: float | None
    overlap: bool
    checkpointed: bool

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return Net(self.model, self.checkpointed)


@dataclass(frozen=True)
class Curve:
    """What a training leaves."""

    losses: list[float]
    """Of every micro-batch of this rank."""
    norms: list[float]
    weights: dict[str, Tensor]


# --- sharded


def train(case: Case) -> Curve:
    """The case by ds_zero, on the ranks of the test."""
    rank, _ = world()
    model = case.build()
    optimizer = OPTIMIZERS[case.optimizer](p for p in model.parameters() if p.requires_grad)
    config = ds_zero.ZeroConfig(
        accumulation=case.plan,  # type: ignore[arg-type]
        param_dtype=DTYPES.get(case.dtype),
        reduce_bucket_numel=200,
        persistence_threshold_numel=8,
        overlap_reduce=case.overlap,
        prefetch=case.overlap,
        overlap_publish=case.overlap and case.stage in (1, 2),
    )
    ds_zero.shard(model, optimizer, case.stage, config=config)
    scaler = ds_zero.LossScaler(model, LOSS_SCALE) if case.dtype == "fp16" else None
    losses, norms = [], []
    for step in range(STEPS):
        for micro in range(case.accumulation):
            loss = model(*batch(step * case.accumulation + micro, rank))
            part = loss / case.accumulation
            (scaler.scale(part) if scaler is not None else part).backward()
            losses.append(loss.item())
        if case.clip is not None:
            norms.append(ds_zero.clip_grad_norm_(model, case.clip).item())
        optimizer.step()
        optimizer.zero_grad()
    assert scaler is None or scaler.skipped_steps == 0
    weights = {k: v.clone() for k, v in everywhere(ds_zero.full_state_dict(model)).items()}
    ds_zero.destroy(model)
    return Curve(losses, norms, weights)


# --- one process


class Reference:
    """Plain PyTorch in one process, for all ranks at once."""

    def __init__(self, case: Case, disturb: bool = False) -> None:
        self.case = case
        self.model = case.build()
        self.masters = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        if case.dtype in DTYPES:
            self.model.to(DTYPES[case.dtype])
        self.params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = OPTIMIZERS[case.optimizer](self.masters[n].requires_grad_() for n in self.params)
        self.scale = LOSS_SCALE if case.dtype == "fp16" else 1.0
        self.disturb = torch.Generator().manual_seed(1) if disturb else None

    def gradients(self, micro: int, rank: int) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one rank's micro-batch, in the dtype of the model."""
        self.model.zero_grad()
        loss = self.model(*batch(micro, rank))
        (loss / self.case.accumulation * self.scale).backward()
        return loss.item(), {n: p.grad.clone() for n, p in self.params.items() if p.grad is not None}

    def step(self, number: int, watch: int) -> tuple[list[float], list[float]]:
        """One optimizer step; losses of rank `watch`, and the norm where it is clipped."""
        case = self.case
        micros = range(number * case.accumulation, (number + 1) * case.accumulation)
        found = {(m, r): self.gradients(m, r) for m in micros for r in range(case.ranks)}
        grads: dict[str, Tensor] = {}
        for name in self.params:
            if name in found[micros[0], 0][1]:
                table = {key: value[1][name].float() for key, value in found.items()}
                grads[name] = self.total(table, micros) / self.scale
        norms = []
        if case.clip is not None:
            norm = ds_zero.total_norm(list(grads.values()))
            norms.append(norm.item())
            factor = torch.clamp(case.clip / (norm + 1e-6), max=1.0)
            grads = {n: g * factor for n, g in grads.items()}
        for name, grad in grads.items():
            self.masters[name].grad = self.moved(grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(self.masters[name])
        return [found[m, watch][0] for m in micros], norms

    def total(self, table: Mapping[tuple[int, int], Tensor], micros: Iterable[int]) -> Tensor:
        """The mean over ranks of the sum over micro-batches, in the plan's order."""
        ranks = range(self.case.ranks)
        if self.case.plan == "local":
            return tree([add([table[m, r] for m in micros]) for r in ranks]) / self.case.ranks
        return add([tree([table[m, r] for r in ranks]) / self.case.ranks for m in micros])

    def moved(self, grad: Tensor) -> Tensor:
        """Every element to one of its neighbours, or as it is."""
        if self.disturb is None:
            return grad
        up = torch.rand(grad.shape, generator=self.disturb) < 0.5
        return torch.where(up, torch.nextafter(grad, grad + 1), torch.nextafter(grad, grad - 1))


def add(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def tree(parts: list[Tensor]) -> Tensor:
    """The sum in the order of a fixed binary tree."""
    if len(parts) == 1:
        return parts[0]
    middle = 1 << ((len(parts) - 1).bit_length() - 1)
    return tree(parts[:middle]) + tree(parts[middle:])


def reference(case: Case, *, disturb: bool = False) -> Curve:
    """The case in one process."""
    job = Reference(case, disturb)
    losses: list[float] = []
    norms: list[float] = []
    for number in range(STEPS):
        some, norm = job.step(number, world()[0])
        losses += some
        norms += norm
    names = job.model.state_dict(keep_vars=True)
    known = {id(p): n for n, p in job.model.named_parameters()}
    frozen = {n for n, p in job.model.named_parameters() if not p.requires_grad}
    weights = {}
    for name, param in names.items():
        first = known[id(param)]
        weights[name] = (param if first in frozen else job.masters[first]).detach()
    return Curve(losses, norms, weights)


# --- judgement


def same(found: Curve, expected: Curve, what: str) -> None:
    """Bit for bit."""
    assert found.losses == expected.losses, f"{what}: losses {found.losses} and {expected.losses}"
    assert found.norms == expected.norms, f"{what}: norms {found.norms} and {expected.norms}"
    assert list(found.weights) == list(expected.weights), what
    for name, value in expected.weights.items():
        worst = (found.weights[name].float() - value.float()).abs().max().item()
        assert torch.equal(found.weights[name], value), f"{what}: {name} differs by {worst}"


def distance(a: Curve, b: Curve) -> float:
    """The largest difference of a weight, relative to its tensor's largest, or of a loss."""
    found = [
        ((a.weights[n].float() - b.weights[n].float()).abs().max() / b.weights[n].float().abs().max()).item()
        for n in b.weights
    ]
    found += [abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True)]
    return max(found)


def judge(case: Case, found: Curve, expected: Curve) -> None:
    """Bitwise where the arithmetic is the same; a third is no binary fraction: then within twice what plain PyTorch
    shows when every gradient is moved by one unit in the last place.
    """
    if case.ranks in (1, 2, 4):
        same(found, expected, f"{case} against one process")
        return
    allowed = 2 * max(distance(reference(case, disturb=True), expected), 2.0**-24)
    gone = distance(found, expected)
    assert math.isfinite(gone) and gone <= allowed, f"{case}: {gone} from one process, {allowed} are allowed"


def sync_case(case: Case) -> bool:
    """Whether this test's ranks are those of the case."""
    return case.ranks == (dist.get_world_size() if dist.is_initialized() else 1)
