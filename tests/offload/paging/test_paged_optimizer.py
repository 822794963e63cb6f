"""An optimizer whose states are paged trains like the same optimizer in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from contracts.distant_store import DistantStore
from ds_core.optim import FusedAdagrad, FusedLamb, FusedLion
from ds_offload import CPUAdam, CPULamb, CPUMuon, HostStore, NVMeStore, PagedOptimizer, PagingError

Make = Callable[[Iterable[Tensor]], Optimizer]

ELEMENTWISE: dict[str, Make] = {
    "CPUAdam": lambda p: CPUAdam(p, lr=1e-2, weight_decay=0.1),
    "bf16 states": lambda p: CPUAdam(p, lr=1e-2, state_dtype=torch.bfloat16),
    "FusedAdagrad": lambda p: FusedAdagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "FusedLion": lambda p: FusedLion(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1, foreach=True),
    "Rprop": lambda p: torch.optim.Rprop(p, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, foreach=True),
}
WHOLE: dict[str, Make] = {
    "FusedLamb": lambda p: FusedLamb(p, lr=1e-2, weight_decay=0.1),
    "CPULamb": lambda p: CPULamb(p, lr=1e-2, weight_decay=0.1),
    "CPUMuon": lambda p: CPUMuon(p, lr=1e-2),
}
"""Optimizers that see whole tensors. Their pages may be as large as the states of the largest one."""
OPTIMIZERS = ELEMENTWISE | WHOLE


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 7), nn.Linear(7, 1))


def train(module: nn.Module, optimizer: Optimizer, steps: range, schedule: Any = None) -> None:
    for step in steps:
        torch.manual_seed(step)
        module(torch.randn(8, 64)).square().mean().backward()
        if step == 1:  # a parameter without a gradient keeps its states
            next(iter(module.parameters())).grad = None
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def distant(**options: Any) -> Any:
    return DistantStore(("state",), **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def assert_same_states(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["state"].keys() == b["state"].keys()
    for index, states in a["state"].items():
        assert states.keys() == b["state"][index].keys()
        for name, value in states.items():
            other = b["state"][index][name]
            if isinstance(value, Tensor):
                assert torch.equal(value, other) and value.dtype == other.dtype, (index, name)
            else:
                assert value == other, (index, name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_has_the_bits_of_the_optimizer_in_memory(kind: str) -> None:
    plain = model()
    expected = OPTIMIZERS[kind](plain.parameters())
    train(plain, expected, range(4))
    for page_bytes, num_buffers in ((32768, 3), (49152, 4), (1 << 20, 3)):
        module = model()
        store = distant(in_thread=page_bytes == 32768)
        optimizer = PagedOptimizer(
            OPTIMIZERS[kind](module.parameters()), store, page_bytes=page_bytes, num_buffers=num_buffers
        )
        train(module, optimizer, range(4))
        assert same(module, plain)
        assert_same_states(expected.state_dict(), optimizer.state_dict())
        if kind != "SGD":
            assert store.calls["store", "state"] >= 4
            largest = max(page_bytes, 8 * 64 * 300 if kind in WHOLE else 0)
            assert optimizer.buffer_bytes == sum(store.staged_bytes.values()) <= num_buffers * largest


@pytest.mark.parametrize("kind", ["CPUAdam", "momentum"])
@pytest.mark.parametrize(("reads", "writes"), [(False, False), (True, False), (False, True)])
def test_overlap_does_not_change_the_bits(kind: str, reads: bool, writes: bool) -> None:
    plain, module = model(), model()
    train(plain, OPTIMIZERS[kind](plain.parameters()), range(3))
    optimizer = PagedOptimizer(
        OPTIMIZERS[kind](module.parameters()),
        distant(),
        page_bytes=32768,
        num_buffers=1 + reads + writes,
        overlap_reads=reads,
        overlap_writes=writes,
    )
    train(module, optimizer, range(3))
    assert same(module, plain)


def test_the_next_page_is_loaded_and_the_last_one_stored_meanwhile() -> None:
    for overlapped in (True, False):
        module, store = model(), distant()
        optimizer = PagedOptimizer(
            CPUAdam(module.parameters()),
            store,
            page_bytes=32768,
            overlap_reads=overlapped,
            overlap_writes=overlapped,
        )
        train(module, optimizer, range(2))
        store.log.clear()
        train(module, optimizer, range(2, 3))
        log = [(action, key.name) for action, key in store.log]
        first, second = "page 3", "page 4"
        ahead = log.index(("load", second)) < log.index(("store", first))
        behind = log.index(("store done", first)) > log.index(("load done", second))
        assert (ahead, behind) == (overlapped, overlapped)


def test_states_are_read_in_place_of_the_optimizers_own(tmp_path: Any) -> None:
    module = model()
    optimizer = PagedOptimizer(CPUAdam(module.parameters()), tmp_path, page_bytes=32768)
    first = next(iter(module.parameters()))
    assert first not in optimizer.state and not optimizer.state.get(first) and not optimizer.state
    train(module, optimizer, range(1))
    assert len(optimizer.state) == 6 and first in optimizer.state
    copied = optimizer.state[first]["exp_avg"]
    assert copied.shape == first.shape and copied.any()
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        copied.zero_()
    with optimizer.states_opened([first], write=True):
        optimizer.state[first]["exp_avg"].fill_(2)
    assert (optimizer.state[first]["exp_avg"] == 2).all()
    with optimizer.states_opened([first]):
        optimizer.state[first]["exp_avg"].fill_(3)
    assert (optimizer.state[first]["exp_avg"] == 2).all(), "stored without write=True"
    optimizer.state[first] = {**optimizer.state[first], "exp_avg": torch.full_like(first, 4)}
    assert (optimizer.state[first]["exp_avg"] == 4).all()
    second = list(module.parameters())[1]
    assert (optimizer.state[second]["exp_avg"] != 4).all(), "other parameters of the page keep theirs"
    with pytest.raises(ValueError, match=r"state 'exp_avg_sq' of a parameter of shape \(300, 64\) is None"):
        optimizer.state[first] = {"step": torch.ones(()), "exp_avg": torch.zeros_like(first)}
    optimizer.state.pop(first)
    assert first not in optimizer.state and len(optimizer.state) == 5
    with pytest.raises(KeyError):
        optimizer.state.pop(first)
    optimizer.close()
    assert not optimizer.state and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["CPUAdam", "AdamW", "Adagrad"])
def test_state_dicts_go_into_memory_and_back(kind: str) -> None:
    module = model()
    paged = PagedOptimizer(OPTIMIZERS[kind](module.parameters()), distant(), page_bytes=32768)
    train(module, paged, range(2))
    saved = copy.deepcopy(paged.state_dict())
    weights = copy.deepcopy(module.state_dict())
    results = []
    for wrap in (True, False):
        other = model()
        other.load_state_dict(weights)
        optimizer = OPTIMIZERS[kind](other.parameters())
        if wrap:
            optimizer = PagedOptimizer(optimizer, distant(), page_bytes=49152)
        optimizer.load_state_dict(saved)
        train(other, optimizer, range(2, 4))
        results.append(other)
    train(module, paged, range(2, 4))
    assert same(results[0], module) and same(results[1], module)


def test_schedules_and_closures_work() -> None:
    plain, module = model(), model()
    for net, wrap in ((plain, False), (module, True)):
        optimizer: Optimizer = CPUAdam(net.parameters(), lr=1e-2)
        if wrap:
            optimizer = PagedOptimizer(optimizer, HostStore(), page_bytes=32768)
        train(net, optimizer, range(4), torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        loss = optimizer.step(lambda: 3.5)  # type: ignore[arg-type]
        assert loss == 3.5
    assert same(plain, module)


def test_two_groups_keep_their_options() -> None:
    plain, module = model(), model()
    for net, wrap in ((plain, False), (module, True)):
        params = list(net.parameters())
        groups = [{"params": params[:3], "weight_decay": 0.5}, {"params": params[3:], "lr": 0.1}]
        optimizer: Optimizer = CPUAdam(groups, lr=1e-2)
        if wrap:
            optimizer = PagedOptimizer(optimizer, distant(), page_bytes=1 << 20)
        train(net, optimizer, range(3))
        optimizer.param_groups[1]["lr"] = 0.05
        train(net, optimizer, range(3, 5))
    assert same(plain, module)


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_step_scales_and_copies(fused: bool) -> None:
    make: Make = OPTIMIZERS["CPUAdam" if fused else "AdamW"]
    values = [torch.randn(5000), torch.randn(70)]
    grads = [torch.randn(5000).bfloat16(), torch.randn(70)]
    expected = [v.clone() for v in values]
    plain = make(expected)
    for value, grad in zip(expected, grads, strict=True):
        value.grad = grad.float() * 0.5
    plain.step()
    optimizer = PagedOptimizer(make(values), distant(), page_bytes=16384)
    for value, grad in zip(values, grads, strict=True):
        value.grad_dtype = None
        value.grad = grad
    out = torch.zeros(5000, dtype=torch.bfloat16)
    optimizer.step_fused(values, grad_scale=torch.tensor(0.5), out=[out, None])
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert torch.equal(out, values[0].bfloat16())
    with pytest.raises(ValueError, match="out has 1 entries, but params has 2"):
        optimizer.step_fused(values, grad_scale=torch.tensor(0.5), out=[None])


@pytest.mark.parametrize("action", ["load", "store"])
def test_a_store_that_fails_is_named(action: str) -> None:
    module, store = model(), distant()
    optimizer = PagedOptimizer(CPUAdam(module.parameters()), store, page_bytes=32768)
    train(module, optimizer, range(2))
    store.fails[action, "state"] = OSError(5, "Input/output error")
    with pytest.raises(
        PagingError,
        match=rf"DistantStore could not {action} the optimizer states of page \d+: OSError.*checkpoint",
    ):
        train(module, optimizer, range(2, 5))
    optimizer.close()


def test_what_cannot_be_paged_is_refused() -> None:
    module = model()
    with pytest.raises(ValueError, match="num_buffers=2, but it needs 3: one page is stepped, one is loaded"):
        PagedOptimizer(CPUAdam(module.parameters()), distant(), num_buffers=2)
    optimizer = PagedOptimizer(torch.optim.Adafactor(module.parameters()), distant())
    with pytest.raises(ValueError, match="Adafactor gives another result if a parameter is split in two"):
        train(module, optimizer, range(1))
    module = model()
    optimizer = PagedOptimizer(CPUAdam(module.parameters()), distant())
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copy.deepcopy(optimizer)
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = PagedOptimizer(torch.optim.SGD(embedding.parameters(), momentum=0.9), distant())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="no sparse gradients"):
        optimizer.step()


def test_memory_formats_other_than_contiguous() -> None:
    results = []
    for wrap in (True, False):
        torch.manual_seed(0)
        conv = nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer: Optimizer = CPUAdam(conv.parameters())
        if wrap:
            optimizer = PagedOptimizer(optimizer, distant(), page_bytes=16384)
        for step in range(3):
            torch.manual_seed(step)
            conv(torch.randn(2, 16, 8, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append((conv, optimizer.state_dict()))
    assert same(results[0][0], results[1][0])
    assert_same_states(results[0][1], results[1][1])


def test_states_move_between_stores_of_pages(tmp_path: Any) -> None:
    """A second optimizer may share a store, such as that of a second model."""
    store = NVMeStore(tmp_path)
    nets = [model(), model()]
    both = [PagedOptimizer(CPUAdam(net.parameters()), store, page_bytes=32768) for net in nets]
    for net, optimizer in zip(nets, both, strict=True):
        train(net, optimizer, range(3))
    assert same(*nets)
    both[0].close()
    train(nets[1], both[1], range(3, 4))
    store.close()
