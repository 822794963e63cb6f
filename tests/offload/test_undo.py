"""Steps that can be taken back: afterwards parameters and states have the bits from before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

import ds_offload
from contracts.distant_store import DistantStore
from ds_offload import CPUAdam, HostStore, NVMeStore, PagedOptimizer
from ds_offload.interfaces import Tier

Make = Callable[[Iterable[Any]], Optimizer]

IN_MEMORY: dict[str, Make] = {
    "CPUAdam": lambda p: CPUAdam(p, lr=1e-2, weight_decay=0.1),
    "bf16 states": lambda p: CPUAdam(p, lr=1e-2, state_dtype=torch.bfloat16),
    "8 bits": lambda p: CPUAdam(p, lr=1e-2, state_dtype="int8"),
    "stochastic rounding": lambda p: CPUAdam(p, lr=1e-2, state_dtype="bf16", seed=3),
    "CPUAdagrad": lambda p: ds_offload.CPUAdagrad(p, lr=1e-2),
    "CPULion": lambda p: ds_offload.CPULion(p, lr=1e-3),
    "CPUSGD": lambda p: ds_offload.CPUSGD(p, lr=1e-2, momentum=0.9),
    "CPULamb": lambda p: ds_offload.CPULamb(p, lr=1e-2),
    "CPUMuon": lambda p: ds_offload.CPUMuon(p, lr=1e-2),
}


def on_a_disk(params: Iterable[Any], **options: Any) -> PagedOptimizer:
    store = DistantStore(("state",), in_thread=True)
    return PagedOptimizer(CPUAdam(params, lr=1e-2, weight_decay=0.1), store, page_bytes=16384, **options)


ALL = IN_MEMORY | {"PagedOptimizer": on_a_disk}


def parameters() -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(60, 50).requires_grad_(),
        torch.randn(7, 3).requires_grad_(),
        torch.randn(40, 90).requires_grad_(),
    ]


def give_gradients(params: list[Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape)


def bits(optimizer: Optimizer, params: list[Tensor]) -> list[Any]:
    found: list[Any] = [p.detach().clone() for p in params]
    for param in params:
        if param in optimizer.state:
            held = optimizer.state[param]
            found += [(n, v.clone() if isinstance(v, Tensor) else v) for n, v in sorted(held.items())]
        else:
            found.append("no state")
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        (
            torch.equal(x, y)
            if isinstance(x, Tensor)
            else (
                x == y
                if isinstance(x, str)
                else x[0] == y[0] and bool((torch.as_tensor(x[1]) == torch.as_tensor(y[1])).all())
            )
        )
        for x, y in zip(a, b, strict=True)
    )


def step(optimizer: Any, params: list[Tensor], scale: float = 1.0, *, undoable: bool, **options: Any) -> None:
    chosen = optimizer.step_undoable if undoable else optimizer.step_fused
    chosen(params, grad_scale=torch.tensor(scale), out=[None] * len(params), **options)


@pytest.mark.parametrize("kind", ALL)
def test_a_step_taken_back_leaves_the_bits_from_before(kind: str) -> None:
    params, others = parameters(), parameters()
    optimizer: Any = ALL[kind](params)
    expected: Any = ALL[kind](others)
    for number in range(4):
        give_gradients(params, number)
        give_gradients(others, number)
        before = bits(optimizer, params)
        for _ in range(2):  # also twice, with another factor
            step(optimizer, params, 1000.0, undoable=True)
            assert not same(bits(optimizer, params), before)
            optimizer.rollback()
            assert same(bits(optimizer, params), before), number
        step(optimizer, params, 0.5, undoable=True)
        optimizer.commit()
        step(expected, others, 0.5, undoable=False)
        optimizer.rollback()  # nothing is left to take back
        assert same(bits(optimizer, params), bits(expected, others)), number


@pytest.mark.parametrize("kind", ALL)
def test_some_parameters_after_the_others(kind: str) -> None:
    params, others = parameters(), parameters()
    optimizer: Any = ALL[kind](params)
    expected: Any = ALL[kind](others)
    for number in range(3):
        give_gradients(params, number)
        give_gradients(others, number)
        for param in reversed(params):
            step(optimizer, [param], undoable=True)
        after = bits(optimizer, params)
        step(expected, others, undoable=False)
        assert same(after, bits(expected, others))
        if number == 1:
            optimizer.rollback(params)
            for param in params:
                step(optimizer, [param], undoable=True)
            assert same(bits(optimizer, params), after)
        # The next step_undoable of a parameter makes the earlier ones final.


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_one_of_several_is_taken_back(kind: str) -> None:
    params = parameters()
    optimizer: Any = IN_MEMORY[kind](params)
    for number in range(2):
        give_gradients(params, number)
        before = bits(optimizer, params[1:2])
        step(optimizer, params, undoable=True)
        after = bits(optimizer, [params[0], params[2]])
        optimizer.rollback([params[1]])
        assert same(bits(optimizer, params[1:2]), before)
        assert same(bits(optimizer, [params[0], params[2]]), after)
        optimizer.commit()


def test_pages_that_parameters_share_are_taken_back_together() -> None:
    params = parameters()
    optimizer = on_a_disk(params)
    give_gradients(params, 0)
    before = bits(optimizer, params)
    step(optimizer, params, undoable=True)
    with pytest.raises(ValueError, match=r"rollback of 1 parameters: page \d+ also has states of parameters"):
        optimizer.rollback([params[1]])
    optimizer.rollback(params)
    assert same(bits(optimizer, params), before)


def test_a_page_of_its_own_is_taken_back_alone() -> None:
    params = [torch.randn(2048).requires_grad_() for _ in range(3)]
    optimizer = on_a_disk(params)
    for number in range(2):
        give_gradients(params, number)
        before = bits(optimizer, params[:1])
        step(optimizer, params, undoable=True)
        after = bits(optimizer, params[1:])
        optimizer.rollback(params[:1])
        assert same(bits(optimizer, params[:1]), before)
        optimizer.commit()
        assert same(bits(optimizer, params[1:]), after)


def test_a_caller_may_restore_the_parameters_itself() -> None:
    for kind in ("CPUAdam", "PagedOptimizer"):
        params = parameters()
        optimizer: Any = ALL[kind](params)
        for number in range(2):
            give_gradients(params, number)
            before, old = bits(optimizer, params), [p.detach().clone() for p in params]
            step(optimizer, params, undoable=True, with_values=False)
            after = [p.detach().clone() for p in params]
            optimizer.rollback()
            assert all(torch.equal(p, a) for p, a in zip(params, after, strict=True))
            with torch.no_grad():
                for param, value in zip(params, old, strict=True):
                    param.copy_(value)
            assert same(bits(optimizer, params), before)
            step(optimizer, params, undoable=True)
            optimizer.commit()


def test_the_log_takes_the_bytes_that_were_announced() -> None:
    params = parameters()
    optimizer = CPUAdam(params)
    numel = sum(p.numel() for p in params)
    give_gradients(params, 0)
    assert optimizer.undo_bytes(params) == 4 * numel  # there are no states yet
    step(optimizer, params, undoable=True)
    optimizer.commit()
    for _ in range(2):
        announced = optimizer.undo_bytes(params)
        assert announced == 12 * numel + 4 * len(params)
        assert optimizer.undo_bytes(params, with_values=False) == announced - 4 * numel
        step(optimizer, params, undoable=True)
        optimizer.commit()
        assert optimizer._undo_log.num_bytes == announced


def test_states_in_a_store_take_no_memory_for_their_log() -> None:
    params = parameters()
    store = DistantStore(("state",))
    optimizer = PagedOptimizer(CPUAdam(params), store, page_bytes=16384)
    give_gradients(params, 0)
    assert optimizer.undo_bytes(params) == 4 * sum(p.numel() for p in params)
    assert optimizer.undo_bytes(params, with_values=False) == 0
    step(optimizer, params, undoable=False)
    assert optimizer.second_bytes == 0
    for _ in range(2):
        step(optimizer, params, undoable=True, with_values=False)
        assert optimizer.second_bytes == optimizer.state_bytes
        assert optimizer.buffer_bytes <= 4 * 16384
        optimizer.rollback()
    optimizer.close()
    assert not store._bytes


def test_pages_follow_in_the_order_of_the_last_steps_of_their_kind() -> None:
    """Backward steps parameters in another order than the pages have, which must not cost loads."""
    params = [torch.randn(2048).requires_grad_() for _ in range(8)]
    store = DistantStore(("state",))
    optimizer = PagedOptimizer(CPUAdam(params), store, page_bytes=16384, num_buffers=3)
    give_gradients(params, 0)
    step(optimizer, params, undoable=False)
    for number in range(3):
        give_gradients(params, number)
        store.calls.clear()
        for param in reversed(params):
            step(optimizer, [param], undoable=True)
        optimizer.commit()
    assert store.calls["load", "state"] <= len(params) + 2


def test_reading_states_between_step_and_rollback_gives_those_of_the_step(tmp_path: Any) -> None:
    params = parameters()
    optimizer = PagedOptimizer(CPUAdam(params), tmp_path, page_bytes=16384)
    give_gradients(params, 0)
    step(optimizer, params, undoable=True)
    optimizer.commit()
    first = optimizer.state[params[0]]["exp_avg"].clone()
    give_gradients(params, 1)
    step(optimizer, params, undoable=True)
    assert not torch.equal(optimizer.state[params[0]]["exp_avg"], first)
    optimizer.rollback()
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], first)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], first)
    optimizer.close()


def test_states_of_a_host_store_are_taken_back() -> None:
    params = parameters()
    optimizer = PagedOptimizer(CPUAdam(params), HostStore(), page_bytes=16384)
    give_gradients(params, 0)
    before = bits(optimizer, params)
    step(optimizer, params, undoable=True)
    optimizer.rollback()
    assert same(bits(optimizer, params), before)
    assert optimizer.undo_bytes(params) == 12 * sum(p.numel() for p in params)


class HalfOnDisk(NVMeStore):
    """Keeps the states of one size of parameters in memory."""

    def state_tier(self, param: torch.Tensor) -> Tier:
        return "host" if param.numel() == 2048 else "disk"


def test_only_states_in_memory_count_for_the_log(tmp_path: Path) -> None:
    params = [torch.randn(numel).requires_grad_() for numel in (2048, 4096, 2048, 4096)]
    optimizer = PagedOptimizer(CPUAdam(params), HalfOnDisk(tmp_path), page_bytes=16384)
    give_gradients(params, 0)
    step(optimizer, params, undoable=True)
    optimizer.commit()
    assert optimizer.undo_bytes(params, with_values=False) == 8 * 2 * 2048
    assert optimizer.undo_bytes([params[1]], with_values=False) == 0
    optimizer.close()
