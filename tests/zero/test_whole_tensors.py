"""Optimizers that need whole tensors, and LAMB by segments, at every stage against one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

import ds_zero
from ds_core.optim import FusedAdam, FusedLamb, Muon, muon_groups
from harness import ranks
from zero.models import Tiny, batch
from zero.params.test_records import Memory, everyones
from zero.parity import everywhere

STAGES = [0, 1, 2, 3]


class Matrices(nn.Module):
    """Nothing but matrices, of odd sizes: what torch's Muon takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 15)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in ((15, 22), (22, 9), (9, 15)))
        self.head = nn.Linear(15, 37, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


class Normalised(Optimizer):
    """A step of fixed length for each tensor; unknown to ds_zero."""

    def __init__(self, params: Iterable[Tensor], lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / (p.grad.norm() + 1e-6))


Make = Callable[[nn.Module], Optimizer]
CASES: dict[str, tuple[type[nn.Module], Make]] = {
    "torch muon": (Matrices, lambda m: torch.optim.Muon(m.parameters(), lr=0.02)),
    "muon": (Tiny, lambda m: Muon(muon_groups(m.named_parameters()), lr=0.02, adam_lr=1e-2)),
    "adafactor": (Tiny, lambda m: torch.optim.Adafactor(m.parameters(), lr=0.05)),
    "lamb": (Tiny, lambda m: FusedLamb(m.parameters(), lr=0.02, weight_decay=0.1)),
    "unknown": (Tiny, lambda m: Normalised(m.parameters())),
}
cases = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = CASES[case][0]()
    return model, CASES[case][1](model)


def plain(case: str, steps: int, size: int) -> dict[str, Tensor]:
    """One process, plain PyTorch: the mean of the ranks' gradients, added as the ordered reduction does."""
    model, optimizer = made(case)
    params = list(model.parameters())
    for step in range(steps):
        parts = [torch.autograd.grad(model(*batch(step, r)), params) for r in range(size)]
        total = [_tree([grads[i] for grads in parts]) / size for i in range(len(params))]
        factor = torch.clamp(0.5 / (ds_zero.total_norm(total) + 1e-6), max=1.0)
        for param, grad in zip(params, total, strict=True):
            param.grad = grad * factor
        optimizer.step()
    return {n: v.detach() for n, v in model.state_dict().items()}


def _tree(parts: list[Tensor]) -> Tensor:
    half = 1 << ((len(parts) - 1).bit_length() - 1) if len(parts) > 1 else 0
    return parts[0] if len(parts) == 1 else _tree(parts[:half]) + _tree(parts[half:])


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        model(*batch(step, dist.get_rank())).backward()
        ds_zero.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()


@ranks(2, 4)
@cases
def test_every_stage_equals_one_process(case: str, world_size: int) -> None:
    expected = plain(case, 5, world_size)
    for stage in STAGES:
        model, optimizer = made(case)
        ds_zero.shard(
            model,
            optimizer,
            stage,
            config=ds_zero.ZeroConfig(reduce_bucket_numel=900, accumulation="sharded"),
        )
        train(model, optimizer, range(5))
        found = everywhere(ds_zero.full_state_dict(model))
        for name, value in expected.items():
            assert torch.equal(found[name], value), (
                f"stage {stage}: {name} {(found[name] - value).abs().max()}"
            )
        ds_zero.destroy(model)


@ranks(3)
@cases
def test_three_ranks(case: str) -> None:
    expected = plain(case, 3, 3)
    for stage in (1, 3):
        model, optimizer = made(case)
        ds_zero.shard(model, optimizer, stage)
        train(model, optimizer, range(3))
        found = everywhere(ds_zero.full_state_dict(model))
        for name, value in expected.items():
            # bf16 inside Muon makes much of little
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-3 if "muon" in case else 1e-5)


@ranks(2)
@cases
def test_in_16_bits_all_stages_agree(case: str) -> None:
    found = []
    for stage in STAGES:
        model, optimizer = made(case)
        config = ds_zero.ZeroConfig(param_dtype=torch.bfloat16, accumulation="sharded")
        ds_zero.shard(model, optimizer, stage, config=config)
        train(model, optimizer, range(3))
        found.append(everywhere(ds_zero.full_state_dict(model)))
    assert all(torch.equal(other[n], found[0][n]) for other in found[1:] for n in found[0])


@ranks(2)
@cases
@pytest.mark.parametrize("origin, target", [(2, 3), (3, 0), (0, 1)])
def test_a_checkpoint_goes_on_at_another_stage(case: str, origin: int, target: int) -> None:
    model, optimizer = made(case)
    ds_zero.shard(model, optimizer, origin, config=ds_zero.ZeroConfig(accumulation="sharded"))
    train(model, optimizer, range(2))
    saved = Memory(everyones(ds_zero.records(model, optimizer)))
    assert all((count == 1).all() for count in saved.seen.values())
    train(model, optimizer, range(2, 4))
    expected = everywhere(ds_zero.full_state_dict(model))
    again, optimizer = made(case)
    with torch.no_grad():
        for param in again.parameters():
            param.zero_()
    ds_zero.shard(again, optimizer, target, config=ds_zero.ZeroConfig(accumulation="sharded"))
    ds_zero.load_records(again, optimizer, saved)
    train(again, optimizer, range(2, 4))
    found = everywhere(ds_zero.full_state_dict(again))
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@ranks(2)
def test_whole_tensors_are_on_one_rank_in_their_own_shape() -> None:
    model, optimizer = made("muon")
    ds_zero.shard(model, optimizer, 2)
    muon, adam = optimizer.param_groups
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    boxes: list[list[tuple[int, ...]]] = [[], []]
    dist.all_gather_object(boxes, [tuple(e.shape) for e in muon["params"]])
    for shape, first, second in zip(shapes, *boxes, strict=True):
        assert {first, second} == {shape, (0,)}
    assert all(e.ndim == 1 for e in adam["params"])
    numel = [e.numel() for e in muon["params"]]
    assert abs(2 * sum(numel) - sum(a * b for a, b in shapes)) <= 2 * max(a * b for a, b in shapes)


@ranks(2)
def test_states_that_exist_already_go_to_their_owner() -> None:
    model, optimizer = made("torch muon")
    model(*batch(0, 0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    again, other = made("torch muon")
    ds_zero.shard(again, other, 0)
    again(*batch(0, 0)).backward()
    other.step()
    other.zero_grad()
    ds_zero.shard(model, optimizer, 2)
    for m, o in ((model, optimizer), (again, other)):
        train(m, o, range(1, 3))
    found, expected = (everywhere(ds_zero.full_state_dict(m)) for m in (model, again))
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@ranks(2)
def test_the_layout_can_be_asked_for() -> None:
    results = []
    for layout in (None, "whole"):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = FusedAdam(model.parameters(), lr=1e-2)
        ds_zero.shard(model, optimizer, 2, config=ds_zero.ZeroConfig(layout=layout))
        assert any(e.ndim == 2 for e in optimizer.param_groups[0]["params"]) == (layout == "whole")
        train(model, optimizer, range(3))
        results.append(everywhere(ds_zero.full_state_dict(model)))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    model, optimizer = made("adafactor")
    with pytest.raises(ValueError, match=r"Adafactor needs whole tensors.*flat layout"):
        ds_zero.shard(model, optimizer, 2, config=ds_zero.ZeroConfig(layout="flat"))
    with pytest.raises(ValueError, match='layout=\'round\': give "flat", "whole"'):
        ds_zero.ZeroConfig(layout="round")  # type: ignore[arg-type]


class Coupled(Normalised):
    """Divides by the norm of all gradients together: no rank can do that alone."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.sub_(0.1 * p.grad / norm)


@ranks(2)
def test_an_optimizer_that_couples_tensors_is_refused() -> None:
    model = Tiny()
    with pytest.raises(ValueError, match="Coupled gives another result if a tensor is stepped without"):
        ds_zero.shard(model, Coupled(model.parameters()), 2)
    with pytest.raises(ValueError, match="Normalised gives another result if a tensor is split in two"):
        ds_zero.shard(model, Normalised(model.parameters()), 2, config=ds_zero.ZeroConfig(layout="flat"))
