"""Masters, gradients and parameters that a store keeps away train to the same bits as those beside the model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_zero
from contracts.distant_store import DistantStore
from ds_checkpoint.format.records import in_memory
from ds_core.optim import FusedAdam, FusedLamb
from ds_zero import _registry
from ds_zero.interfaces import ShardKey
from ds_zero.runtime.staging import NUM_BUFFERS
from harness import ranks
from zero.models import Tiny, batch
from zero.parity import Job, assert_same, sharded

SMALL = {"reduce_bucket_numel": 700, "persistence_threshold_numel": 20}


def adam(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return FusedAdam(params, lr=1e-2, weight_decay=0.1)


def job(**options: Any) -> Job:
    return Job(
        **{"steps": 3, "accumulation": 2, "clip": 0.3, "optimizer": adam, "model": {"extras": True}} | options
    )


@ranks(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("plan", ["local", "sharded"])
def test_training_has_the_bits_of_resident_shards(stage: int, plan: str) -> None:
    for dtype, in_thread in ((torch.float32, True), (torch.bfloat16, False)):
        run = job(dtype=dtype)
        expected = sharded(run, stage, accumulation=plan, **SMALL)
        store = DistantStore(in_thread=in_thread)
        assert_same(sharded(run, stage, store=store, accumulation=plan, **SMALL), expected)
        assert store.calls["sink_grad", "grad"] and store.calls["load", "grad"]
        apart = stage == 3 or dtype == torch.bfloat16
        assert bool(store.calls["load", "master"] and store.calls["store", "master"]) == apart
        if stage == 3 and dtype == torch.bfloat16:
            assert store.calls["load", "param"] and store.calls["store", "param"]


@ranks(2)
@pytest.mark.parametrize("away", [("master",), ("grad",), ("param",)])
def test_any_kind_may_be_away_alone(away: tuple[str, ...]) -> None:
    run = job(dtype=torch.bfloat16)
    expected = sharded(run, 3, **SMALL)
    store = DistantStore(away)
    assert_same(sharded(run, 3, store=store, **SMALL), expected)
    assert {kind for _, kind in store.calls} == set(away)


def lamb(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return FusedLamb(params, lr=1e-2)


@ranks(2)
def test_other_ways_of_adding_and_stepping() -> None:
    for stage, run, config in (
        (0, job(), {}),
        (2, job(accumulation=3), {"rank_invariant": True}),
        (3, job(optimizer=lamb), {}),
        (3, job(dtype=torch.float16, scale=ds_zero.DynamicScale(initial_scale=2.0**17, hysteresis=1)), {}),
        (2, job(), {"reduce_scatter": False, "overlap_reduce": False}),
    ):
        expected = sharded(run, stage, **SMALL, **config)
        found = sharded(run, stage, store=DistantStore(), **SMALL, **config)
        assert_same(found, expected)


# --- one process


def make(store: Any, stage: int = 3, dtype: torch.dtype | None = torch.bfloat16, **config: Any) -> Any:
    torch.manual_seed(0)
    model = Tiny(layers=6, extras=True)
    optimizer = adam([p for p in model.parameters() if p.requires_grad])
    options = ds_zero.ZeroConfig(param_dtype=dtype, **SMALL, **config)
    return ds_zero.shard(model, optimizer, stage, config=options, store=store)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, *, clip: bool = True
) -> list[float]:
    losses = []
    for step in range(steps):
        for micro in range(2):
            loss = model(*batch(2 * step + micro, 0))
            loss.backward()
            losses.append(loss.item())
        if clip:
            ds_zero.clip_grad_norm_(model, 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def everything(model: nn.Module) -> dict[str, Tensor]:
    return ds_zero.full_state_dict(model)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [2, 3])
def test_staging_memory_is_five_buckets_and_works_overlap(stage: int, dtype: torch.dtype) -> None:
    store = DistantStore()
    model, optimizer = make(store, stage, dtype)
    train(model, optimizer)
    buckets = [b for b in _registry.state_of(model).buckets if b.trainable]
    largest = max(b.layout.padded_numel for b in buckets)
    assert len(buckets) > 5
    kinds = {k for b in buckets for k in b.storage.kinds.reserved}
    each = sum(dtype.itemsize if kind == "param" else 4 for kind in kinds)
    assert 0 < store.staged_bytes[largest] <= NUM_BUFFERS * each * largest
    frozen = sum(4 * b.layout.padded_numel for b in _registry.state_of(model).buckets if not b.trainable)
    assert sum(store.staged_bytes.values()) <= NUM_BUFFERS * each * largest + frozen
    memory = ds_zero.memory(model, optimizer)
    assert memory.grads_bytes <= NUM_BUFFERS * 4 * largest + _local_bytes(model)
    # The next bucket's load begins before this one's values are stored, and before it is done.
    store.log.clear()
    train(model, optimizer, 1)
    kind = "master" if "master" in kinds else "grad"
    order = [(action, key.name) for action, key in store.log if key.kind == kind]
    loads = [i for i, (action, _) in enumerate(order) if action == "load"]
    if kind == "master":
        second = order[loads[1]]
        first_stored = next(i for i, (a, n) in enumerate(order) if a == "store" and n == order[loads[0]][1])
        assert order.index(second) < first_stored
        assert ("store", "store done") not in {(a, b) for (a, _), (b, _) in pairwise(order)}, (
            "a store was waited for"
        )


def _local_bytes(model: nn.Module) -> int:
    return _registry.state_of(model).reducer.local_bytes()


@pytest.mark.parametrize("stage", [1, 3])
def test_values_by_name_agree_and_can_be_written(stage: int) -> None:
    found = []
    for store in (None, DistantStore()):
        model, optimizer = make(store, stage)
        train(model, optimizer)
        model(*batch(7, 0)).backward()
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        values = {
            (n, kind): ds_zero.get_full(model, n, kind)
            for n in names
            for kind in ("param", "grad", "exp_avg")
        }
        ds_zero.clip_grad_norm_(model, 0.1)
        values |= {(n, "local"): ds_zero.get_local(model, n) for n in names}
        values |= {(n, "local grad"): ds_zero.get_local(model, n, "grad") for n in names}
        ds_zero.set_full(model, names[0], "param", torch.full_like(values[names[0], "param"], 0.25))
        ds_zero.set_full(model, names[1], "grad", torch.full_like(values[names[1], "param"], 0.5))
        ds_zero.set_local(model, names[2], "param", torch.ones(ds_zero.local_range(model, names[2])[1]))
        ds_zero.update_full_grads(model, names[3:5], lambda grad, _: grad * 2)
        with ds_zero.gathered(model, write=True):
            model.head.weight.data[0] = 3.0
        optimizer.step()
        optimizer.zero_grad()
        losses = train(model, optimizer)
        found.append((values, losses, everything(model)))
    (values, losses, weights), (others, other_losses, other_weights) = found
    for key, value in values.items():
        other = others[key]
        assert (value is None) == (other is None) and (value is None or torch.equal(value, other)), key
    assert losses == other_losses
    assert_equal(weights, other_weights)


class _Records:
    """What `records` gave, as a source."""

    def __init__(self, records: list[Any]) -> None:
        self._held: dict[str, dict[str, Any]] = {}
        for record in records:
            self._held.setdefault(record.fqn, {})[record.state] = record

    def states(self, fqn: str, *_: object) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (r.global_shape, r.data.dtype) for name, r in self._held.get(fqn, {}).items()}

    def read(self, fqn: str, state: str, flat_offset: int, out: Tensor, *_: object) -> None:
        out.copy_(in_memory(self._held[fqn][state].data)[flat_offset : flat_offset + out.numel()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_of_one_store_load_into_the_other(dtype: torch.dtype) -> None:
    for source, target in ((None, DistantStore()), (DistantStore(), None)):
        model, optimizer = make(source, 3, dtype)
        train(model, optimizer)
        saved = ds_zero.records(model, optimizer)
        other, other_optimizer = make(target, 3, dtype)
        train(other, other_optimizer, 1)
        ds_zero.load_records(other, other_optimizer, _Records(saved))
        assert_equal(everything(model), everything(other))
        assert train(model, optimizer) == train(other, other_optimizer)
        assert_equal(everything(model), everything(other))


def test_entries_stay_and_are_safe_to_read_while_they_are_away() -> None:
    model, optimizer = make(DistantStore())
    entries = optimizer.param_groups[0]["params"]
    identities = [id(e) for e in entries]
    shapes = [e.shape for e in entries]
    model(*batch(0, 0)).backward()
    grads = {id(e): e.grad for e in entries}
    for entry in entries:
        assert entry.isnan().all()
        assert entry.grad is None or entry.grad.isnan().all()
    optimizer.step()
    assert [id(e) for e in optimizer.param_groups[0]["params"]] == identities
    assert [e.shape for e in entries] == shapes
    assert all(e.grad is None or grads[id(e)] is e.grad for e in entries)
    assert all(e.isnan().all() for e in entries if e.numel())
    with pytest.raises(RuntimeError, match="single memory location"):
        next(e for e in entries if e.numel() > 1).data.add_(1)


def test_gradients_set_to_zero_while_they_are_away_are_zero() -> None:
    results = []
    for store in (None, DistantStore()):
        model, optimizer = make(store)
        losses = []
        for step in range(3):
            loss = model(*batch(step, 0))
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        optimizer.step()  # with gradients that are zero: moments decay
        results.append((losses, everything(model)))
    assert results[0][0] == results[1][0]
    assert_equal(results[0][1], results[1][1])


def test_a_write_while_it_is_away_is_refused() -> None:
    model, optimizer = make(DistantStore())
    train(model, optimizer, 1)
    entry = next(e for e in optimizer.param_groups[0]["params"] if e.numel() > 1)
    with torch.no_grad():
        entry.fill_(3.0)
    with pytest.raises(
        ValueError, match=r"master of bucket .* was written while DistantStore has its values"
    ):
        train(model, optimizer, 1)


@pytest.mark.parametrize(
    ("action", "kind"),
    [("load", "master"), ("load", "grad"), ("load", "param"), ("store", "master"), ("sink_grad", "grad")],
)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_failing_work_names_bucket_and_kind(action: str, kind: str, in_thread: bool) -> None:
    store = DistantStore(in_thread=in_thread)
    model, optimizer = make(store)
    train(model, optimizer, 1)
    store.fails[action, kind] = OSError(5, "Input/output error")
    verb = "add a gradient to" if action == "sink_grad" else action
    with pytest.raises(
        ds_zero.ShardStoreError,
        match=rf"DistantStore could not {verb} the {kind} of bucket '\d+:.*Input/output",
    ):
        train(model, optimizer, 2)
    assert not store.fails


def test_a_failed_load_can_be_tried_again() -> None:
    store = DistantStore(("param",))
    model, _ = make(store)
    expected = model(*batch(0, 0)).item()
    store.fails["load", "param"] = OSError("busy")
    with pytest.raises(ds_zero.ShardStoreError, match="busy"):
        model(*batch(0, 0))
    assert model(*batch(0, 0)).item() == expected


def test_optimizers_that_step_everything_at_once_are_refused_before_anything_moves() -> None:
    model = Tiny()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    options = ds_zero.ZeroConfig(param_dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"AdamW steps all its parameters in one call.*ds_core\.optim\.FusedAdam"
    ):
        ds_zero.shard(model, optimizer, 3, config=options, store=DistantStore())  # type: ignore[arg-type]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    ds_zero.shard(model, optimizer, 3, config=options, store=DistantStore(("param",)))  # type: ignore[arg-type]
    train(model, optimizer, 1)
    late = Tiny()
    ds_zero.shard(late, stage=3, config=options, store=DistantStore())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="AdamW steps all its parameters in one call"):
        ds_zero.shard_optimizer(late, torch.optim.AdamW(late.parameters()))


def test_what_needs_gradients_in_memory_is_refused() -> None:
    model, _ = make(DistantStore(), 0)
    with pytest.raises(ValueError, match='gradients="reduced" where DistantStore keeps gradients away'):
        ds_zero.set_presentation(model, gradients="reduced")
    with pytest.raises(ValueError, match="reads them all"):
        ds_zero.control(model).set_reduction("none")


def test_torchs_checkpoints_need_values_in_memory() -> None:
    model, optimizer = make(DistantStore())
    with pytest.raises(
        ValueError, match=r"DistantStore keeps the values of .* away.*use ds_checkpoint\.save"
    ):
        ds_zero.dcp_state_dict(model, optimizer)


class _Forgets(DistantStore):
    """Neither maps masters nor holds them."""

    def store(self, key: ShardKey, src: Tensor) -> Any:
        if key.kind == "master":
            raise KeyError(key)
        return super().store(key, src)


class _WrongSize(DistantStore):
    """Maps tensors that are too short."""

    def reserve(self, plan: Any) -> Any:
        return {key: tensor[1:] for key, tensor in super().reserve(plan).items()}


def test_a_kind_that_is_missing_is_an_error() -> None:
    with pytest.raises(ds_zero.ShardStoreError, match=r"_Forgets could not store the master of bucket '\d+:"):
        make(_Forgets())
    with pytest.raises(
        ValueError, match=r"_WrongSize reserved a tensor of shape .* for the \w+ of bucket '\d+:"
    ):
        make(_WrongSize(("param",)))
    model, _ = make(DistantStore())
    buckets = _registry.state_of(model).buckets
    frozen = next(b for b in buckets if not b.trainable)
    with pytest.raises(ValueError, match=rf"bucket {frozen.layout.name!r} has no 'master': it has param"):
        frozen.storage.opened("master")


def test_memory_moves_and_comes_back() -> None:
    store = DistantStore()
    model, optimizer = make(store, 3)
    train(model, optimizer, 1)
    away = ds_zero.Away(model)
    away.back()
    train(model, optimizer, 1)
    weights = everything(model)
    ds_zero.destroy(model)
    for name, param in model.named_parameters():
        assert torch.equal(param.detach(), weights[name].to(param.dtype)), name
    assert store.staged_bytes
