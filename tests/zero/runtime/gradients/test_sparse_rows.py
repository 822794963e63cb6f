"""Gradients of embeddings that travel by rows: the same bits as whole gradients, and fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_zero
from ds_zero.comm.collectives import Comm, default_comm
from harness import ranks
from zero.parity import everywhere

CPU = torch.device("cpu")
ROWS, WIDTH = 501, 24


class Words(nn.Module):
    """Mostly an embedding; options make it sparse, tied to the head, or a bag."""

    def __init__(self, *, sparse: bool = False, tied: bool = False, bag: bool = False) -> None:
        super().__init__()
        kind: Any = nn.EmbeddingBag if bag else nn.Embedding
        self.embed = kind(ROWS, WIDTH, sparse=sparse, **({} if bag else {"padding_idx": 0}))
        self.other = nn.Embedding(7, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS if tied else 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.embed(tokens)
        found = found + self.other(tokens % 7).mean(1) if found.dim() == 2 else found + self.other(tokens % 7)
        return self.head(found).square().mean()  # type: ignore[no-any-return]


def tokens(step: int, micro: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
    return torch.randint(0, ROWS, (2, 3), generator=generator)


def train(
    comm: Comm, model: dict[str, Any], micro_batches: int = 1, absent: int | None = None, **config: Any
) -> dict[str, Tensor]:
    """Weights after three steps at stage 0. `absent`: a rank that sees no token of the large embedding."""
    torch.manual_seed(0)
    net = Words(**model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    ds_zero.shard(net, optimizer, 0, config=ds_zero.ZeroConfig(**config), comm=comm)
    for step in range(3):
        for micro in range(micro_batches):
            seen = tokens(step, micro)
            loss = net.other.weight.square().mean() if dist.get_rank() == absent else net(seen)
            (loss / micro_batches).backward()
        ds_zero.clip_grad_norm_(net, 0.05)
        optimizer.step()
        optimizer.zero_grad()
    found = everywhere(ds_zero.full_state_dict(net))
    ds_zero.destroy(net)
    return found


def both(model: dict[str, Any], **config: Any) -> tuple[int, int]:
    """Bytes sent whole and by rows; the weights have to be the same to the bit."""
    sent, found = [], []
    for by_rows in (False, True):
        comm = default_comm(CPU)
        found.append(train(comm, model, sparse_gradients=by_rows, **config))
        sent.append(comm.gathered_bytes + comm.reduced_bytes)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    return sent[0], sent[1]


def summed(**options: Any) -> dict[str, Any]:
    return {"reduce_op": "sum", "grad_dtype": torch.bfloat16, "accumulation": "sharded", **options}


CONFIGS: list[dict[str, Any]] = [
    {"micro_batches": 3},
    {"micro_batches": 3, "accumulation": "sharded"},
    {"communication_dtype": torch.bfloat16, "predivide_factor": 2.0},
    summed(micro_batches=2),
    {"param_dtype": torch.bfloat16},
    {"rank_invariant": True, "micro_batches": 4},
]


@ranks(3)
@pytest.mark.parametrize(
    ("sparse", "config"), [(bool(i % 2), config) for i, config in enumerate(CONFIGS)], ids=str
)
def test_rows_are_fewer_bytes_and_the_same_bits(sparse: bool, config: dict[str, Any]) -> None:
    whole, rows = both({"sparse": sparse}, **config)
    assert rows < whole / 3, (whole, rows)


@pytest.mark.full
@ranks(2, 3)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("config", [{}, *CONFIGS], ids=str)
def test_rows_in_every_combination(sparse: bool, config: dict[str, Any]) -> None:
    whole, rows = both({"sparse": sparse}, **config)
    assert rows < whole / 3, (whole, rows)


@ranks(2)
def test_bytes_of_rows_are_those_of_the_formula() -> None:
    """One step: what differs is the large embedding, (rows of this rank) x (width fp32 + index) and a count."""
    comm, plain = default_comm(CPU), default_comm(CPU)
    for made, by_rows in ((plain, False), (comm, True)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(ROWS, WIDTH))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        config = ds_zero.ZeroConfig(sparse_gradients=by_rows)
        ds_zero.shard(net, optimizer, 0, config=config, comm=made)
        before = made.gathered_bytes + made.reduced_bytes
        assert before == 0
        net(tokens(0, 0)).sum().backward()
        optimizer.step()
        ds_zero.destroy(net)
    unique = len(tokens(0, 0).unique())
    assert comm.reduced_bytes == 0 and comm.gathered_bytes == unique * (4 * WIDTH + 4) + 8
    assert plain.reduced_bytes + plain.gathered_bytes >= ROWS * WIDTH * 4


@ranks(2)
@pytest.mark.parametrize("model", [{"tied": True}, {"bag": True, "sparse": True}], ids=str)
def test_never_much_more_than_the_whole(model: dict[str, Any]) -> None:
    """A weight that is the head's has a gradient everywhere: then the whole travels, and 8 bytes of counts."""
    whole, rows = both(model)
    assert rows <= whole + 200, (whole, rows)


@ranks(2)
def test_a_rank_without_tokens() -> None:
    whole, rows = both({"sparse": True}, absent=1)
    assert rows < whole / 3


@ranks(2)
def test_a_gradient_that_is_not_finite_arrives() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(ROWS, WIDTH))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ds_zero.shard(net, optimizer, 0, config=ds_zero.ZeroConfig(sparse_gradients=True))
    factor = float("nan") if dist.get_rank() == 1 else 1.0
    (net(torch.tensor([3 + dist.get_rank()])) * factor).sum().backward()
    assert not ds_zero.clip_grad_norm_(net, 0.0).isfinite()
    (entry,) = optimizer.param_groups[0]["params"]
    table = entry.grad[: ROWS * WIDTH].view(ROWS, WIDTH)
    assert table[4].isnan().all() and table[3].isfinite().all() and table[3].all()


@ranks(2)
def test_reading_gradients_that_wait() -> None:
    found = []
    for by_rows in (False, True):
        torch.manual_seed(0)
        net = Words()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ds_zero.shard(net, optimizer, 0, config=ds_zero.ZeroConfig(sparse_gradients=by_rows))
        with ds_zero.no_sync(net):
            net(tokens(0, 0)).backward()
        waiting = ds_zero.get_full(net, "embed.weight", "grad")
        net(tokens(0, 1)).backward()
        found.append((waiting, ds_zero.get_full(net, "embed.weight", "grad")))
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and a.any() and torch.equal(a, b)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_is_for_stage_0(stage: int) -> None:
    net = Words()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"sparse_gradients=True with stage={stage}: .* use stage 0"):
        ds_zero.shard(net, optimizer, stage, config=ds_zero.ZeroConfig(sparse_gradients=True))


@pytest.mark.full
def test_a_plan_tells_the_most_that_may_travel_and_what_fits_instead() -> None:
    sample = torch.zeros(2, 3, dtype=torch.long)
    plans = [
        ds_zero.plan(
            Words(),
            sample,
            stage=0,
            ranks=4,
            config=ds_zero.ZeroConfig(sparse_gradients=by_rows),
            device="cpu",
            budget_bytes=300_000,
        )
        for by_rows in (False, True)
    ]
    whole, rows = (sum(plan.sent_bytes.values()) for plan in plans)
    assert whole <= rows <= whole * 1.05
    assert [r.text for r in plans[0].remedies] == [r.text for r in plans[1].remedies] != []
