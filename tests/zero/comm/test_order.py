"""Ranks that do not run the same modules raise, all of them, and say who ran what."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import ds_zero
from ds_zero import _registry
from ds_zero.comm.order import Event, OrderLog, Standing, first_difference, judge, lost
from harness import ranks

pytestmark = pytest.mark.filterwarnings("ignore:modules ran in another order")

DIM = 8
SOON_S = 0.6


class Ways(nn.Module):
    """Runs the blocks it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.ways = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        x = self.first(x)
        for i in order:
            x = self.ways[i](x)
        return x


@contextmanager
def sharded(stage: int = 3, **options: object) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """A model on a group of its own, whose connections the test may break."""
    group = dist.new_group(list(range(dist.get_world_size())))
    torch.manual_seed(0)
    model = Ways()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ds_zero.ZeroConfig(persistence_threshold_numel=0, order_timeout_s=SOON_S, **options)  # type: ignore[arg-type]
    ds_zero.shard(model, optimizer, stage, DeviceMesh.from_group(group, "cpu"), config=config)
    yield model, optimizer
    _registry.state_of(model).waiting.stop()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, order: list[int]) -> None:
    model(torch.ones(2, DIM), order).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def everybody_raises(body: Callable[[], None]) -> list[str]:
    """The messages of all ranks; each has to raise `RankOrderError`."""
    with pytest.raises(ds_zero.RankOrderError) as caught:
        body()
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, str(caught.value))
    return messages


@ranks(2, 4, groups_may_stay=True, timeout_s=120)
def test_another_order_on_one_rank() -> None:
    last = dist.get_world_size() - 1
    with sharded(prefetch=False) as (model, optimizer):
        train(model, optimizer, [0, 1, 2, 3])

        def diverge() -> None:
            train(model, optimizer, [0, 2, 1, 3] if dist.get_rank() == last else [0, 1, 2, 3])

        for message in everybody_raises(diverge):
            assert "ranks run modules in different order" in message
            assert "in step 1" in message
            assert "ran forward of ways.1" in message
            assert f"rank {last} ran forward of ways.2" in message
            assert f"rank {last}: step 1" in message
            assert "rank 0: step 1" in message
            assert "forward of ways.0 > [forward of ways.1]" in message
            assert "test_order.py" in message
            assert "leaf_modules" in message


@ranks(2, 4, groups_may_stay=True, timeout_s=120)
def test_one_rank_skips_an_expert() -> None:
    """The others wait for its share of the expert, it waits for them at the next module, or in backward."""
    with sharded(prefetch=False) as (model, optimizer):

        def skip() -> None:
            train(model, optimizer, [0, 1] if dist.get_rank() else [0, 2, 1])

        for message in everybody_raises(skip):
            assert "rank 0 ran forward of ways.2" in message
            assert "1 ran forward of ways.1" in message or "ran forward of ways.1" in message


@ranks(2, groups_may_stay=True, timeout_s=120)
@pytest.mark.parametrize("stage", [1, 3])
def test_one_rank_has_a_batch_more(stage: int) -> None:
    """It waits in forward or in its reduction; the other one, at a barrier of the user's."""
    with sharded(stage) as (model, optimizer):

        def loop() -> None:
            for _ in range(2 + dist.get_rank()):
                train(model, optimizer, [0, 1])
            try:
                dist.barrier(group=_registry.state_of(model).ranks.group)
            except RuntimeError as error:
                raise ds_zero.RankOrderError(f"at the barrier: {error}") from error

        messages = everybody_raises(loop)
        assert "rank 0 stopped while rank 1 went on" in messages[1]
        assert "in loop" in messages[1]


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_one_rank_does_one_more_forward() -> None:
    with sharded(prefetch=False) as (model, optimizer):

        def more() -> None:
            if dist.get_rank():
                model(torch.ones(2, DIM), [0])
            train(model, optimizer, [0])

        for message in everybody_raises(more):
            assert "ran forward of" in message
            assert "ran backward of" in message


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_slow_is_not_stuck() -> None:
    """A rank that is at work much longer than the limit is waited for; while all goes well only signs of life are
    sent.
    """
    import time

    with sharded() as (model, optimizer):
        state = _registry.state_of(model)
        train(model, optimizer, [0])
        if dist.get_rank():
            time.sleep(3 * SOON_S)
        train(model, optimizer, [0])
        assert state.waiting.looks > 3
        said: list[str] = []
        board = state.waiting._store

        class Spy:
            def set(self, key: str, value: str) -> None:
                if "/alive/" not in key:
                    said.append(key)

            def get(self, key: str) -> bytes:
                return board.get(key)

            def check(self, keys: list[str]) -> bool:
                said.extend(keys)
                return board.check(keys)

        state.waiting._store = Spy()
        for silent in (False, True):  # in the first round it may take back what it said before
            said.clear()
            looks = state.waiting.looks
            enough = torch.zeros(1)
            while not enough:  # as often on both ranks
                train(model, optimizer, [0])
                enough.fill_(state.waiting.looks >= looks + 3)
                dist.all_reduce(enough, op=dist.ReduceOp.MIN)
            assert not (silent and said)


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_a_rank_that_waits_alone_is_reported_before_anything_ends() -> None:
    """As one that saves or evaluates alone: both wait, in the same order of modules so far."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ds_zero").addHandler(handler)
    try:
        with sharded() as (model, optimizer):
            train(model, optimizer, [0])

            def alone() -> None:
                if dist.get_rank() == 0:
                    train(model, optimizer, [0])
                    return
                try:
                    dist.barrier(group=_registry.state_of(model).ranks.group)
                except RuntimeError as error:
                    raise ds_zero.RankOrderError(f"at the barrier: {error}") from error

            everybody_raises(alone)
    finally:
        logging.getLogger("ds_zero").removeHandler(handler)
    reports = [text for text in said if "have waited" in text]
    if dist.get_rank() == 0:
        assert len(reports) == 1 and "rank 1 waits for other ranks at" in reports[0]
        assert "in alone" in reports[0] and "saving, evaluation, generation" in reports[0]
    else:
        assert reports == [], "the first rank that waits speaks for all"


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_a_rank_whose_connection_broke_keeps_its_standing_while_it_asks() -> None:
    """The watching thread took it back, because the rank had made progress a moment before."""
    with sharded() as (model, optimizer):
        train(model, optimizer, [0])
        waiting = _registry.state_of(model).waiting
        if dist.get_rank() == 1:
            waiting.stop()  # as if its process had ended
        dist.barrier()
        if dist.get_rank() == 0:
            waiting.log.note("forward", "")

            def broken() -> None:
                with waiting.guard("a message"):
                    raise RuntimeError("Connection closed by peer")

            with pytest.raises(ds_zero.RankOrderError, match=r"; rank 1 do not answer"):
                broken()
        dist.barrier()


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_a_rank_that_ended_while_it_waited_is_not_taken_for_one_that_answers() -> None:
    """What it wrote about itself before its end is still in the store."""
    with sharded() as (model, optimizer):
        train(model, optimizer, [0])
        waiting = _registry.state_of(model).waiting
        waiting.stop()
        if dist.get_rank() == 1:
            waiting._write_standing(blocked=True)
        dist.barrier()
        if dist.get_rank() == 0:
            with pytest.raises(ds_zero.RankOrderError, match=r"; rank 1 do not answer"), waiting.guard("x"):
                raise RuntimeError("Connection closed by peer")
        dist.barrier()


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_a_machine_that_vanished_is_named_once_it_shows_no_sign_of_life() -> None:
    with sharded() as (model, optimizer):
        train(model, optimizer, [0])
        watch = _registry.state_of(model).waiting
        watch.stop()
        texts = {watch._key("alive/0"): "0:7", watch._key("alive/1"): "1:3"}

        class Texts:
            def set(self, key: str, value: str) -> None:
                texts[key] = value

            def get(self, key: str) -> bytes:
                return texts[key].encode()

            def check(self, keys: list[str]) -> bool:
                return keys[0] in texts

        watch._store, watch._index = Texts(), 0
        watch._write_standing(blocked=True)
        long_s = 10 * watch._timeout_s
        assert watch._decide(long_s) is None, "the first look says nothing about silence"
        watch._heartbeats = {
            rank: (beat, since - long_s) for rank, (beat, since) in watch._heartbeats.items()
        }
        texts[watch._key("alive/0")] = "0:8"
        said = watch._decide(long_s)
        assert said is not None and "rank 1 do not answer" in said and "no heartbeat" in said
        texts[watch._key("alive/1")] = "1:4"  # it was only stopped
        assert watch._decide(long_s) is None
        dist.barrier()


@ranks(2)
def test_no_watch_and_no_thread() -> None:
    import threading

    before = set(threading.enumerate())  # watches of models of earlier tests end when those are collected
    model = Ways()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, 3, config=ds_zero.ZeroConfig(order_timeout_s=0))
    train(model, optimizer, [0])
    assert not [t for t in set(threading.enumerate()) - before if t.name == "ds_zero.comm.watchdog"]


def standing(rank: int, events: str, *, begin: int = 0, blocked: bool = True) -> Standing:
    recent = tuple(Event("forward", name, 0) for name in events)
    return Standing(
        rank=rank,
        count=begin + len(recent),
        recent=recent,
        waiting="x",
        blocked=blocked,
        where="here",
        beat=1,
    )


def test_the_first_difference() -> None:
    assert first_difference([standing(0, "abc"), standing(1, "abz")]) == 2
    assert first_difference([standing(0, "abc"), standing(1, "ab")]) is None
    assert first_difference([standing(0, "bcd", begin=1), standing(1, "abce")]) == 3
    assert first_difference([standing(0, "xyz", begin=9), standing(1, "abc")]) == 9


def test_who_is_at_work_is_waited_for() -> None:
    same = {0: standing(0, "abc"), 1: standing(1, "ab")}
    other = {0: standing(0, "abc"), 1: standing(1, "abz")}
    assert judge(same, 2, patient=False) is None
    assert judge(same, 3, patient=True) is None
    assert "rank 1 stopped while rank 0 went on" in str(judge(same, 2, patient=True))
    assert "rank 0 ran forward of c; rank 1 ran forward of z" in str(judge(other, 2, patient=False))
    assert judge({**other, 1: standing(1, "abz", blocked=False)}, 2, patient=True) is None
    assert "; rank 1 do not answer" in lost({0: standing(0, "ab")}, [1], [], "Connection closed")
    assert "; rank 5 went on running" in lost({0: standing(0, "ab")}, [1], [5], "Connection closed")


def test_a_standing_survives_the_store() -> None:
    log = OrderLog()
    for unit in ("a", "b"):
        log.note("forward", unit)
    log.note("step", "")
    made = Standing(
        rank=1, count=log.count, recent=log.recent(), waiting="", blocked=True, where="x:1", beat=3
    )
    assert Standing.from_json(made.to_json()) == made
    assert log.step == 1
