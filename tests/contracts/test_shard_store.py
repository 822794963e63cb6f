"""What ds_zero expects of a ShardStore, run against every implementation."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
import torch

from contracts.distant_store import DistantStore
from ds_offload import HostStore, NVMeStore
from ds_zero.interfaces import Reservation, ShardKey, ShardStore
from ds_zero.params.stores import ResidentStore


def disk() -> ShardStore:
    """All kinds in a file."""
    return NVMeStore(tempfile.gettempdir(), ("param", "master", "grad"))  # type: ignore[return-value]


STORES: list[Callable[[], ShardStore]] = [ResidentStore, HostStore, DistantStore, disk]  # type: ignore[list-item]
ADDRESSABLE = STORES[:2]
CPU = torch.device("cpu")


def plan() -> list[Reservation]:
    return [
        Reservation(
            key=ShardKey(name=n, kind=kind), partition=f"g.{kind}", numel=numel, dtype=dtype, device=CPU
        )
        for kind, dtype in (("master", torch.float32), ("grad", torch.float32), ("param", torch.bfloat16))
        for n, numel in (("a", 64), ("b", 32), ("empty", 0))
    ]


@pytest.fixture(params=STORES, ids=lambda s: s.__name__)
def store(request: pytest.FixtureRequest) -> ShardStore:
    made: ShardStore = request.param()
    return made


def loaded(store: ShardStore, name: str, kind: str) -> torch.Tensor:
    item = next(i for i in plan() if i.key == ShardKey(name=name, kind=kind))
    out = torch.full((item.numel,), float("nan"), dtype=item.dtype)
    store.load(item.key, out).wait()
    return out


def test_reserved_tensors_have_size_dtype_and_zeros(store: ShardStore) -> None:
    reserved = store.reserve(plan())
    for item in plan():
        assert not loaded(store, item.key.name, item.key.kind).any()
        if item.key in reserved:
            tensor = reserved[item.key]
            assert (tensor.shape, tensor.dtype) == ((item.numel,), item.dtype)
            assert not tensor.any()


@pytest.mark.parametrize("store", ADDRESSABLE, ids=lambda s: s.__name__, indirect=True)
def test_a_partition_is_contiguous_in_the_order_given(store: ShardStore) -> None:
    reserved = store.reserve(plan())
    a, b = (reserved[ShardKey(name=n, kind="master")] for n in "ab")
    assert b.data_ptr() == a.data_ptr() + 64 * 4
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    grad = reserved[ShardKey(name="a", kind="grad")]
    assert grad.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()


def test_what_is_stored_is_loaded(store: ShardStore) -> None:
    reserved = store.reserve(plan())
    key = ShardKey(name="a", kind="master")
    store.store(key, torch.arange(64.0)).wait()
    assert torch.equal(reserved.get(key, torch.arange(64.0)), torch.arange(64.0))
    assert torch.equal(loaded(store, "a", "master"), torch.arange(64.0))


def test_what_is_stored_is_rounded_to_the_dtype_at_rest(store: ShardStore) -> None:
    store.reserve(plan())
    values = torch.linspace(0, 1, 64)
    store.store(ShardKey(name="a", kind="param"), values).wait()
    assert torch.equal(loaded(store, "a", "param"), values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_put_or_added_at_an_offset(store: ShardStore, dtype: torch.dtype) -> None:
    store.reserve(plan())
    key = ShardKey(name="a", kind="grad")
    store.sink_grad(key, torch.ones(64, dtype=dtype), offset=0, accumulate=False).wait()
    store.sink_grad(key, torch.full((10,), 2.0, dtype=dtype), offset=32, accumulate=True).wait()
    store.sink_grad(key, torch.full((4,), 5.0, dtype=dtype), offset=0, accumulate=False).wait()
    expected = torch.ones(64)
    expected[32:42] += 2
    expected[:4] = 5
    assert torch.equal(loaded(store, "a", "grad"), expected)


def test_release_and_close(store: ShardStore) -> None:
    store.reserve(plan())
    store.release(ShardKey(name="a", kind="grad"))
    with pytest.raises(KeyError):
        store.load(ShardKey(name="a", kind="grad"), torch.empty(64)).wait()
    store.close()
    store.close()
    with pytest.raises(KeyError):
        store.load(ShardKey(name="b", kind="grad"), torch.empty(32)).wait()
