"""Two threads that train over one process group are refused by name; over groups of their own they train."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from harness import ranks


def train(group: dist.ProcessGroup | None) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds_zero.shard(model, optimizer, stage=2, mesh=group)
    for _ in range(3):
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def in_thread(name: str, act: Callable[[], object]) -> list[object]:
    """What `act` returned in a thread of this name, or the exception that it raised."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(act())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run, name=name)
    thread.start()
    thread.join()
    return results


@ranks(2)
def test_a_second_thread_over_one_group_is_refused() -> None:
    first = train(None)
    [error] = in_thread("second", lambda: train(None))
    assert isinstance(error, RuntimeError)
    assert "ds_zero.shard in thread 'second': thread 'MainThread' trains a model over the same" in str(error)
    own = dist.new_group()
    [second] = in_thread("second", lambda: train(own))
    assert isinstance(second, nn.Linear)
    assert torch.equal(second.weight, first.weight)
    ds_zero.destroy(second)
    ds_zero.destroy(first)
    # Nothing is trained over the group any more.
    [third] = in_thread("third", lambda: train(None))
    assert isinstance(third, nn.Module)
    ds_zero.destroy(third)
    dist.destroy_process_group(own)


@ranks(2)
def test_what_an_ended_thread_has_left_is_taken_over() -> None:
    [first] = in_thread("first", lambda: train(None))
    assert isinstance(first, nn.Module)
    ds_zero.destroy(train(None))
    ds_zero.destroy(first)
