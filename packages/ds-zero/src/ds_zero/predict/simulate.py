"""Runs the training steps of one rank, with this package's own code, on tensors without memory.

[Note: plan by simulation]
A formula for the memory of a step would duplicate what `shard`, the reducer, the gatherer and the optimizer do, and
would become wrong when one of them changes. So this module runs their code, on torch's fake tensors, which have shapes,
dtypes and storages with sizes, but no elements. A simulated process group counts the messages, and the `Ledger` tracks
the allocated storages. Plans for accelerators also use fake CPU tensors, because a torch without support for a device
has no fake tensors of it. They use the accelerator's collectives, its defaults of optimizers, and the block size of its
allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from ds_zero import _registry
from ds_zero.api.control import control
from ds_zero.api.loop import clip_grad_norm_
from ds_zero.api.shard import shard
from ds_zero.comm.ranks import Ranks
from ds_zero.comm.topology import MeshFor, Topology, topology_of
from ds_zero.config import ZeroConfig
from ds_zero.interfaces import (
    ChoosesTiers,
    CollectiveSet,
    PlansActivations,
    PlansStates,
    Reservation,
    ShardKey,
    Tier,
)
from ds_zero.layout.units import choose_units
from ds_zero.params.records import records
from ds_zero.predict import allocation_tracker
from ds_zero.predict.allocation_tracker import Ledger, PhasePeaks, torchs_own
from ds_zero.predict.early_step_bytes import early_step_bytes
from ds_zero.predict.fake_group import FakeGroup, StandInStore
from ds_zero.predict.fake_ops import LeanOperations
from ds_zero.predict.model_copy import fake_copy
from ds_zero.predict.optimizer_probe import probe_states, stand_in
from ds_zero.predict.planned_comm import FrozenStandIn, planned_comm
from ds_zero.predict.tiers import STATE, ByKind, with_states
from ds_zero.runtime.gradients.loss_scaler import LossScaler
from ds_zero.runtime.gradients.norms import BLOCK_NUMEL
from ds_zero.runtime.storage import GRAD, MASTER, PARAM
from ds_zero.state import ZeroState

MakeOptimizer = Callable[[Any], Optimizer]
RanksFor = Callable[[str, nn.Parameter], int | None]
"""Function from a parameter to the number of ranks among which it is sharded (experts); None: as the model."""
LOAD, FORWARD, BACKWARD, STEP, SAVE = "load", "forward", "backward", "step", "save"
PHASES = (LOAD, FORWARD, BACKWARD, STEP, SAVE)

MAX_MICRO_BATCHES = 4
"""More micro-batches than this hold no more at once than this many: the first is unlike the second (sums begin), and
the last unlike those before (reduction overlaps)."""

_NUM_PAGES, _PAGE_BYTES = 4, 64 << 20
"""Defaults of ds_offload's `PagedOptimizer`."""

_STEPS = 2
"""The first step creates optimizer states and records the order of modules; the second uses them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job to plan, except for the model."""

    stage: int
    num_ranks: int
    config: ZeroConfig
    optimizer: Optimizer | MakeOptimizer
    """An optimizer over the model's parameters, or a function from parameters to an optimizer."""
    micro_batch: Any
    """Arguments of one forward: a tensor, a tuple, or a mapping of keywords. Only shapes and dtypes matter."""
    loss: Callable[[Any], Tensor]
    accumulation_steps: int
    device: torch.device
    offload: frozenset[str] = frozenset()
    """Kinds of shards that are stored in host memory."""
    disk: frozenset[str] = frozenset()
    """Kinds of shards that are stored on a disk; "state": the states of the optimizer."""
    tiers: ChoosesTiers | None = None
    """Decides for each tensor, instead of `offload` and `disk`, which then only name the kinds."""
    checkpointing: bool = False
    clip: bool = True
    shard_ranks: int | None = None
    """Number of ranks among which the model is sharded, if there are replicas; None: all."""
    ranks_for: RanksFor | None = None
    scaled: bool = False
    """Whether a `LossScaler` is used."""
    deferred: bool = False
    """Whether the model is constructed under `deferred_init`: no rank ever holds all of it."""
    states: Mapping[str, torch.dtype] = field(default_factory=dict)
    """States of an optimizer with native kernels, from `probe_states`."""
    undoable: bool = False
    """Whether the optimizer can take steps back."""
    pageable: bool = False
    """Whether the optimizer is element-wise, so that its states may be on a disk."""
    comm: CollectiveSet | None = None
    """Collectives whose bytes are counted if they tell them; None: the default ones."""
    activations: PlansActivations | None = None
    """Moves activations between forward and backward; None: they stay on the device."""

    def topology(self, params: Mapping[str, nn.Parameter]) -> tuple[FakeGroup, Topology]:
        """Returns fake groups for the ranks, as rank 0; all count messages in one counter."""
        group = FakeGroup(0, self.num_ranks)
        main = ranks_in(group, self.num_ranks, self.shard_ranks)
        return group, topology_of(params, main, self.mesh_for(group), None)

    def mesh_for(self, group: FakeGroup) -> MeshFor | None:
        """Returns the argument `mesh_for` of `shard`."""
        if self.ranks_for is None:
            return None
        known: dict[int, Ranks] = {}

        def ranks_of_param(fqn: str, param: nn.Parameter) -> Ranks | None:
            assert self.ranks_for is not None
            size = self.ranks_for(fqn, param)
            if size is None or size == self.num_ranks:
                return None
            if not 0 < size < self.num_ranks or self.num_ranks % size:
                raise ValueError(
                    f"ranks_for gives {fqn!r} {size} ranks: it must be a divisor of {self.num_ranks}"
                )
            if size not in known:
                own = group.part(size) if size > 1 else None
                known[size] = Ranks(own, 0, size, part=(0, self.num_ranks // size))
            return known[size]

        return ranks_of_param

    def tiers_of(self, plan: Sequence[Reservation]) -> dict[ShardKey, Tier]:
        """Returns where each tensor of a rank is stored, and the states (kind "state") of each bucket."""
        choose = self.tiers or ByKind(host=self.offload, disk=self.disk)
        items = with_states(plan)
        return {item.key: tier for item, tier in zip(items, choose(items), strict=True)}

    @property
    def pages_states(self) -> bool:
        """Whether states are on a disk, at least some."""
        return STATE in self.disk

    def page_buffer_bytes(self, alone: Sequence[int], together: int) -> int:
        """Returns the bytes of memory into which ds_offload's `PagedOptimizer` loads states.

        Args:
            alone: the numbers of elements of each bucket whose states are on a disk and which is stepped by a separate
                call, because other tensors of it are away.
            together: the number of elements of the other buckets whose states are on a disk. Their pages contain the
                states of several buckets.
        """
        each = sum(dtype.itemsize for dtype in self.states.values())
        parts = [each * n for n in (*alone, together) if n]
        largest = min(_PAGE_BYTES, max(parts, default=0))
        return min(_NUM_PAGES, sum(-(-part // _PAGE_BYTES) for part in parts)) * largest

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Memory and messages of a simulated job."""

    phases: Mapping[str, PhasePeaks]
    resting: Mapping[str, int]
    """Bytes between steps by purpose, of device and host together."""
    resting_host_bytes: int
    sent_bytes: Mapping[str, int]
    """Bytes sent by one rank per step, by phase."""
    guesses: tuple[str, ...]
    moved_bytes: int = 0
    """Bytes of activations that leave the device in the forwards of one micro-batch."""
    activations_disk_bytes: int = 0
    """The most bytes of activations on a disk."""


def simulate(model: nn.Module, job: Job, *, lean: bool = True) -> Outcome:
    """Simulates load, two steps and a save of `job` on rank 0, on a copy of `model` without memory.

    Args:
        lean: use [Note: fast fake operations]; if False, torch's own fake tensors run all operations.
    """
    # Real tensors in closures of the model, and the inputs, are replaced by fake tensors of the same shapes.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    operations = LeanOperations(mode) if lean else torchs_own
    ledger = Ledger(1 if job.on_cpu else 512, operations, resizes=job.stage == 3)
    with torch.random.fork_rng(devices=[]), mode, ledger:
        return _Run(model, job, ledger).outcome()


class _Run:
    """The objects of one simulated job."""

    def __init__(self, model: nn.Module, job: Job, ledger: Ledger) -> None:
        self.job, self.ledger = job, ledger
        ledger.phase(LOAD, allocation_tracker.PARAMETERS)
        self.model, copies = fake_copy(model, hollow=job.deferred)
        self.model.train(model.training)
        if job.checkpointing:
            checkpoint_units(self.model)
        given = job.optimizer if isinstance(job.optimizer, Optimizer) else job.optimizer(_trainable(model))
        groups = [[copies[id(p)] for p in group["params"]] for group in given.param_groups]
        paged = job.pages_states
        self.optimizer = stand_in(given, groups, dict(job.states), num_ranks=job.num_ranks, paged=paged)
        self._page_buffers: Tensor | None = None
        self._early: list[Tensor] | None = None
        self._tiers: dict[ShardKey, Tier] = {}
        if not job.on_cpu:
            for group in self.optimizer.param_groups:
                if group.get("foreach", True) is None and not group.get("fused"):
                    group["foreach"] = True  # what torch does there
        self.group = FakeGroup(0, job.num_ranks)
        ranks = ranks_in(self.group, job.num_ranks, job.shard_ranks)
        micro = min(job.accumulation_steps, MAX_MICRO_BATCHES)
        self.steps = micro
        self.sent: dict[str, float] = {}
        ledger.phase(LOAD, allocation_tracker.WORKSPACE)
        shard(
            self.model,
            self.optimizer,
            job.stage,
            mesh=ranks,
            mesh_for=job.mesh_for(self.group),
            config=replace(job.config, accumulation_steps=micro),
            store=StandInStore(
                self._tiers_of, partial(self._rest_on_host), simulates_accelerator=not job.on_cpu
            ),
            comm=planned_comm(job.comm, job.config, on_cpu=job.on_cpu),
            norms=_norms,
        )
        self.state: ZeroState = _registry.state_of(self.model)
        self._reduces = not getattr(given, "reduces_gradients", False)
        self._sent_by_optimizer = 0
        if isinstance(given, PlansStates):
            numels = [p.numel() for group in groups for p in group]
            self._sent_by_optimizer = given.planned_bytes(numels, job.num_ranks)
        if not self._reduces:  # the optimizer does, inside of its step
            control(self.model).set_reduction("none")
        if paged:
            self._keep_states_on_disk()
        if job.deferred:  # the values of one bucket at a time are replayed
            ledger.phases[LOAD].add(
                allocation_tracker.PARAMETERS, max(b.layout.padded_numel for b in self.state.buckets) * 4
            )
        self._moved = None
        if job.activations is not None:
            self._moved = job.activations.attach(
                self.model, self._activations_on_host, accelerator=not job.on_cpu
            )
        self.scaler = LossScaler(self.model) if job.scaled and self._reduces else None
        self._classify()

    def _tiers_of(self, items: Sequence[Reservation]) -> Sequence[Tier]:
        tiers = self.job.tiers_of([item for item in items if item.key.kind != STATE])
        self._tiers |= tiers
        return [tiers[item.key] for item in items]

    def _keep_states_on_disk(self) -> None:
        """Excludes the entries whose states are on the disk from those that get states in memory."""
        without: Any = self.optimizer
        for bucket in self.state.buckets:
            if self._tiers.get(ShardKey(name=bucket.layout.name, kind=STATE)) == "disk":
                without.stateless.update(id(shard) for shard in bucket.shards)

    def _page_buffer_bytes(self) -> int:
        alone, together = [], 0
        for bucket in self.state.buckets:
            owned = sum(shard.numel() for shard in bucket.shards)
            if self._tiers.get(ShardKey(name=bucket.layout.name, kind=STATE)) != "disk":
                continue
            if bucket.storage.is_away(MASTER, GRAD, PARAM):
                alone.append(owned)
            else:
                together += owned
        return self.job.page_buffer_bytes(alone, together)

    def _rest_on_host(self, tensor: Tensor) -> None:
        self.ledger.classify([tensor], allocation_tracker.MASTERS, on_host=True)

    def _activations_on_host(self, tensor: Tensor) -> None:
        self.ledger.classify([tensor], allocation_tracker.ACTIVATIONS, on_host=True)

    def outcome(self) -> Outcome:
        self.ledger.watch([b.full for b in self.state.buckets if not b.whole])
        before = 0
        for _ in range(_STEPS):
            before = 0 if self._moved is None else self._moved.moved_bytes
            self.sent = dict.fromkeys((FORWARD, BACKWARD, STEP), 0.0)
            self._step()
        self.ledger.phase("rest", allocation_tracker.WORKSPACE)
        rest = self.ledger.phases.pop("rest")
        self.ledger.phase(SAVE, allocation_tracker.WORKSPACE)
        records(self.model, self.optimizer)
        return Outcome(
            phases={name: self.ledger.phases[name] for name in PHASES},
            resting=rest.both.parts,
            resting_host_bytes=rest.host.num_bytes,
            sent_bytes={name: round(value) for name, value in self.sent.items()},
            guesses=tuple(dict.fromkeys(self.ledger.guesses)),
            moved_bytes=0 if self._moved is None else (self._moved.moved_bytes - before) // self.steps,
            activations_disk_bytes=0 if self._moved is None else self._moved.disk_bytes,
        )

    def _step(self) -> None:
        for number in range(self.steps):
            self._count_sent()
            before = dict(self.sent)
            self._phase(FORWARD, allocation_tracker.ACTIVATIONS)
            loss = self.job.loss(self._forward())
            if self.steps > 1:
                loss = loss / self.steps
            self._phase(BACKWARD, allocation_tracker.ACTIVATIONS)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            del loss
            self._classify()
            if number == 1:  # sends as much as each of those that are not run
                self._count_sent()
                left_out = self.job.accumulation_steps - self.steps
                for phase, bytes_before in before.items():
                    self.sent[phase] += left_out * (self.sent[phase] - bytes_before)
        self._phase(STEP, allocation_tracker.WORKSPACE)
        if self.job.clip and self._reduces:
            clip_grad_norm_(self.model, 1.0)
        self._classify()
        if self.job.pages_states and self._page_buffers is None:
            self._page_buffers = torch.empty(self._page_buffer_bytes(), dtype=torch.uint8)
            self.ledger.classify([self._page_buffers], allocation_tracker.STATES, on_host=True)
        if self._early is None:
            self._early = self._early_step_memory()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._classify()
        self._count_sent()
        self.sent[STEP] += self._sent_by_optimizer

    def _early_step_memory(self) -> list[Tensor]:
        """Allocates what `overlap_step` keeps from the first step on."""
        buckets = [b.layout for b in self.state.buckets]
        early = early_step_bytes(self.job, buckets, self._tiers)
        on_host = torch.empty(early.host, dtype=torch.uint8)
        on_device = torch.empty(early.device, dtype=torch.uint8, device=self.job.device)
        self.ledger.classify([on_host], allocation_tracker.MASTERS, on_host=True)
        self.ledger.classify([on_device], allocation_tracker.MASTERS)
        return [on_host, on_device]

    def _phase(self, name: str, fresh: str) -> None:
        self._count_sent()
        self._sending = name
        self.ledger.phase(name, fresh)

    _sending = LOAD

    def _count_sent(self) -> None:
        if self._sending in self.sent:
            self.sent[self._sending] += self.group.sent_bytes
        self.group.sent_bytes = 0.0

    def _forward(self) -> Any:
        batch = tree_map_only(Tensor, self._input, self.job.micro_batch)
        if isinstance(batch, Mapping):
            return self.model(**batch)
        return self.model(*batch) if isinstance(batch, (tuple, list)) else self.model(batch)

    def _input(self, given: Tensor) -> Tensor:
        wanted = self.job.config.param_dtype
        dtype = wanted if wanted is not None and given.is_floating_point() else given.dtype
        made = torch.empty(given.shape, dtype=dtype, device="cpu")
        return made.requires_grad_(given.requires_grad)

    def _classify(self) -> None:
        """Sets the purpose of all storages whose purpose is known."""
        ledger, buckets = self.ledger, self.state.buckets
        storages = [b.storage for b in buckets]
        ledger.classify([s.addressable(GRAD) for s in storages], allocation_tracker.GRADIENTS)
        ledger.classify([s.addressable(MASTER) for s in storages], allocation_tracker.MASTERS)
        ledger.classify([s.addressable(PARAM) for s in storages], allocation_tracker.PARAMETERS)
        if isinstance(self.state.store, FrozenStandIn):
            ledger.classify(self.state.store.held, allocation_tracker.PARAMETERS)
        ledger.classify(list(self.model.buffers()), allocation_tracker.BUFFERS)
        for shard_, held in self.optimizer.state.items():
            where = ledger.purpose(shard_)
            tensors = [v for v in held.values() if isinstance(v, Tensor)]
            ledger.classify(tensors, allocation_tracker.STATES, on_host=where is not None and where[1])
        ledger.classify(getattr(self.optimizer, "others", []), allocation_tracker.STATES)


def ranks_in(group: FakeGroup, num_ranks: int, shard_ranks: int | None) -> Ranks:
    """Returns the first of `num_ranks` ranks, with the model sharded among `shard_ranks` and the other groups as
    replicas.

    Raises:
        ValueError: the size does not divide the number of ranks.
    """
    size = num_ranks if shard_ranks is None else shard_ranks
    if size < 1 or num_ranks % size:
        raise ValueError(f"shard_ranks={size} does not divide ranks={num_ranks}: it must be a divisor")

    def some(count: int, replicas: Ranks | None = None, axis: str = "data") -> Ranks:
        return Ranks(group.part(count) if count > 1 else None, 0, count, replicas, axis=axis)

    return some(size, some(num_ranks // size, axis="replicate") if size < num_ranks else None)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _norms(tensors: Collection[Tensor]) -> tuple[float, bool]:
    """The memory of `norms.squared_norm`, which takes a block at a time: of many blocks, three."""
    for tensor in tensors:
        flat = tensor.reshape(-1)
        for begin in range(0, min(flat.numel(), 3 * BLOCK_NUMEL), BLOCK_NUMEL):
            block = flat[begin : begin + BLOCK_NUMEL].double()
            torch.dot(block, block)
    return 1.0, True


def checkpoint_units(model: nn.Module) -> None:
    """Makes the blocks of `model` (children of its lists) recompute their activations in backward."""
    lists = (nn.ModuleList, nn.Sequential)
    for name, unit in choose_units(model).items():
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        if isinstance(parent, lists):
            unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)


def optimizer_states(model: nn.Module, optimizer: Optimizer | MakeOptimizer) -> dict[str, torch.dtype]:
    """Returns name -> dtype of the optimizer's element-wise states."""
    given = optimizer if isinstance(optimizer, Optimizer) else optimizer(_trainable(model))
    return probe_states(given)
