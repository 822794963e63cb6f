"""Reports of ranks that wait for each other: the rank, the parameter, the line."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_comm.stalls import Call, Position, explain, watch_stalls
from harness import ranks


def call(
    number: int,
    name: str = "all_reduce",
    tensors: tuple[str, ...] = ("float32[3]",),
    site: str = "a.py:1 in f",
) -> Call:
    return Call(number=number, name=name, tensors=tensors, site=site)


def position(rank: int, *calls: Call, waits: bool = True, place: str = "a.py:9 in g") -> Position:
    return Position(
        rank=rank, place=place, calls={"0,1,2": calls}, waits_in="0,1,2" if waits else None, waited_s=7.2
    )


def test_a_rank_that_has_not_called_it_is_named_with_its_place() -> None:
    first, second = call(4, site="a.py:1 in f"), call(5, site="a.py:2 in f")
    text = explain(
        {0: position(0, first, second), 1: position(1, first, waits=False), 2: position(2, first, second)}
    )
    assert "ranks 0, 2 wait since 7 s in all_reduce (float32[3]) at a.py:2 in f" in text
    assert "rank 1 has not called it: it is at a.py:9 in g" in text
    assert "its last collective of this group was all_reduce at a.py:1 in f" in text


def test_different_shapes_and_different_collectives_are_told_apart() -> None:
    other = call(5, tensors=("float32[4]",), site="b.py:3 in h")
    text = explain({0: position(0, call(5)), 1: position(1, other), 2: position(2, call(5))})
    assert "in different shapes or dtypes (number 5 of their group)" in text
    assert "ranks 0, 2: all_reduce (float32[3]) at a.py:1 in f" in text
    assert "rank 1: all_reduce (float32[4]) at b.py:3 in h" in text
    mixed = {0: position(0, call(5)), 1: position(1, call(5, "barrier", ())), 2: position(2, call(5))}
    assert "in different collectives" in explain(mixed) and "rank 1: barrier at a.py:1 in f" in explain(mixed)
    # An earlier difference counts, although later calls are alike again.
    early = {r: position(r, call(5, tensors=(f"float32[{r // 2}]",)), call(6)) for r in range(3)}
    assert "number 5" in explain(early)


def test_what_else_there_is() -> None:
    same = {rank: position(rank, call(5)) for rank in range(3)}
    assert "all in all_reduce" in explain(same) and "a message was lost" in explain(same)
    assert "rank 2 does not answer" in explain({0: same[0], 1: same[1]}, [2])
    assert explain({0: position(0, waits=False)}) == "no rank waits in a collective"
    assert Position.from_json(same[0].to_json()) == same[0]


@ranks(2)
def test_a_straggler_and_other_shapes_are_reported_while_ranks_wait() -> None:
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    grad, rank, told = model.weight.grad, dist.get_rank(), []
    original = dist.all_reduce
    dist.barrier()
    with watch_stalls(model, timeout_s=0.4, report=told.append):
        dist.all_reduce(torch.ones(5))
        if rank == 1:
            time.sleep(2)  # the straggler
        dist.all_reduce(grad)
        time.sleep(0.5)
        texts: list[list[str]] = [[], []]
        dist.all_gather_object(texts, told)
        (text,) = [text for one in texts for text in one]
        assert "rank 0 waits since" in text and "all_reduce of the gradient of weight (float32[2, 3])" in text
        assert f"{__file__}:" in text and "rank 1 has not called it: it is at" in text
        assert "in test_a_straggler_and_other_shapes" in text
    told.clear()
    # Instead of a real one, which would never end: it ends when the stall has been reported.
    reported = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    dist.all_reduce = lambda tensor: reported.wait(["told"])
    try:
        with watch_stalls(timeout_s=2.0, report=lambda text: (told.append(text), reported.set("told", "1"))):
            dist.all_reduce(torch.ones(3 + rank))
    finally:
        dist.all_reduce = original
    dist.all_gather_object(texts, told)
    (text,) = [text for one in texts for text in one]
    assert "in different shapes" in text and "float32[3]" in text and "float32[4]" in text
    assert dist.all_reduce is original


def test_the_timeout_must_be_positive() -> None:
    with pytest.raises(ValueError, match="timeout_s=0"):
        watch_stalls(timeout_s=0)
