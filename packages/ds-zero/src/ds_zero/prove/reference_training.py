"""The reference of `verify`: plain PyTorch in one process, which processes the micro-batches of all ranks.

[Note: reference training]
The reference has one whole model, one whole optimizer and no collectives. The micro-batches of all ranks run one after
the other. Their gradients are added in the order of the accumulation plan (docs/notes/zero.md): over ranks in a binary
tree; over micro-batches before that, on each rank (`local`), after it (`sharded`), or in one tree with the ranks
(`rank_invariant`). 16-bit parameters have fp32 masters in a second copy of the model, which the optimizer updates. If
the optimizer splits masters, parameters are rounded as it rounds them.
The only code of ds_zero in it computes the norm and changes the loss scale; both have their own tests. So errors in
buckets, slices, messages, hooks, stores or the publication of parameters cannot affect the reference.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_zero.config import ZeroConfig
from ds_zero.interfaces import FusedStep, Norms
from ds_zero.runtime.gradients.loss_scaler import DynamicScale, ScaleState
from ds_zero.runtime.gradients.norms import clip_factor, squared_norm
from ds_zero.runtime.materialize import compute_dtype
from ds_zero.runtime.optimizer_states import splits_masters

Loss = Callable[[Any, Any], Tensor]
"""A function from a model and a micro-batch to a scalar."""


class Schedule(Protocol):
    """A learning-rate schedule: torch's, or the engine's."""

    def step(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of both trainings."""

    make: Callable[[], tuple[nn.Module, Optimizer]]
    """Returns a new model and the optimizer over its parameters, with the same values after the same
    `seed_everything`.
    """
    loss: Loss
    config: Callable[[nn.Module], ZeroConfig]
    """The options of `shard` for such a model."""
    stage: int
    ranks: int
    micro_batches: int
    """Number of micro-batches per rank and step."""
    clip: float = math.inf
    scale: float | DynamicScale | None = None
    """The loss scale; None: losses are not scaled and no step is skipped."""
    schedule: Callable[[Optimizer], Schedule | None] = lambda _: None
    norms: Norms = squared_norm
    dress: Callable[[nn.Module, Callable[[], int]], Any] = lambda model, _: model
    """What `loss` is given for a model and a function that tells the optimizer steps so far."""
    finish: Callable[[nn.Module], None] = lambda _: None
    """What becomes of the model after its parameters have their dtypes (dtypes of buffers)."""
    masters: torch.device | None = None
    """Device of masters and optimizer states; None: the device of the model."""
    seed: int = 0


def seed_everything(seed: int, number: int = 0) -> None:
    """Seeds all generators that models use, from two numbers."""
    mixed = (seed * 1_000_003 + number * 7919 + 17) % (1 << 31)
    torch.manual_seed(mixed)  # accelerators included
    random.seed(mixed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(mixed)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Context manager that restores the caller's generators."""
    numpy: Any = sys.modules.get("numpy")
    kept = random.getstate(), numpy.random.get_state() if numpy is not None else None
    device = torch.accelerator.current_accelerator(check_available=True)
    fork = torch.random.fork_rng(devices=[])
    if device is not None:
        here = torch.accelerator.current_device_index()
        fork = torch.random.fork_rng(devices=[here], device_type=device.type)
    try:
        with fork:
            yield
    finally:
        random.setstate(kept[0])
        if numpy is not None:
            numpy.random.set_state(kept[1])


class TreeSum:
    """Adds tensors in the order of a binary tree over their indices, and keeps at most log2(count) + 1 of them."""

    def __init__(self) -> None:
        self._sums: list[tuple[int, Tensor]] = []

    def push(self, part: Tensor) -> None:
        height = 0
        while self._sums and self._sums[-1][0] == height:
            part = self._sums.pop()[1] + part
            height += 1
        self._sums.append((height, part))

    def nothing(self) -> Tensor:
        """Zeros like what has been added."""
        return torch.zeros_like(self._sums[-1][1])

    def total(self) -> Tensor:
        parts = [part for _, part in self._sums]
        total = parts.pop()
        while parts:
            total = parts.pop() + total
        return total


class LineSum:
    """Adds tensors in order of arrival, in one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sum: Tensor | None = None

    def push(self, part: Tensor) -> None:
        if self._sum is None:
            self._sum = part.to(self._dtype, copy=True)
        else:
            self._sum.add_(part)

    def total(self) -> Tensor:
        assert self._sum is not None
        return self._sum


class PlainTraining:
    """One training by [Note: reference training]: `gradients`, then `update`, for every step."""

    def __init__(self, recipe: Recipe) -> None:
        seed_everything(recipe.seed)
        self._recipe = recipe
        self.keeper, self.optimizer = recipe.make()
        """The model whose parameters are masters, and what steps them."""
        self.config = recipe.config(self.keeper)
        plan = "sharded" if self.config.rank_invariant else self.config.accumulation
        self.local = recipe.stage < 2 if plan is None else plan == "local"
        """[Note: two accumulation plans] in `runtime/gradients/reduce.py`."""
        self._split: set[str] = set()
        """Parameters whose sharded masters are split, `interfaces.SplitsMasters`."""
        self.worker = self._worker()
        """The model that computes; the keeper itself where no dtype or device differs."""
        recipe.finish(self.worker)
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self.names = [n for n, p in self.keeper.named_parameters() if id(p) in trained]
        self._schedule = recipe.schedule(self.optimizer)
        self._counting = ScaleState.of(recipe.scale) if recipe.scale is not None else None
        self.steps = 0
        self.draws = False
        """Whether the model has drawn random numbers."""
        self.skipped = 0
        """Number of steps that were skipped because the gradient was not finite."""
        self.norm = math.nan
        self._grads: dict[str, Tensor] = {}
        self._buffers = [self._copied_buffers() for _ in range(recipe.ranks if self._has_buffers() else 0)]
        self._before = list(self._buffers)
        """Buffers of the ranks at the beginning of the step."""
        self._sizes: dict[str, float] = {}
        """Sum over the step's micro-batches of the largest element of each gradient."""

    # --- construction

    def _worker(self) -> nn.Module:
        dtypes = {n: compute_dtype(n, p, self.config) for n, p in self.keeper.named_parameters()}
        rests = self._recipe.masters
        same = all(
            not p.is_floating_point() or (p.dtype == dtypes[n] and p.element_size() >= 4)
            for n, p in self.keeper.named_parameters()
        )
        if same and rests is None:
            return self.keeper
        worker = copy.deepcopy(self.keeper)
        for name, param in worker.named_parameters():
            param.data = param.data.to(dtypes[name])
        splits = splits_masters(self.optimizer)
        for name, param in self.keeper.named_parameters():
            if not param.is_floating_point():
                continue
            if splits is not None and param.requires_grad and dtypes[name] == torch.bfloat16:
                self._split.add(name)
            param.data = param.data.to(rests, torch.float32)
        self._publish_split(worker)
        return worker

    def _has_buffers(self) -> bool:
        return any(True for _ in self.worker.buffers())

    def _copied_buffers(self) -> dict[str, Tensor]:
        return {n: b.detach().clone() for n, b in self.worker.named_buffers()}

    # --- a step

    @property
    def loss_scale(self) -> float:
        """The current loss scale."""
        return self._counting.scale if self._counting is not None else 1.0

    def gradients(self, batches: Sequence[Sequence[Any]], first: int) -> list[list[float]]:
        """Gradients of one step, kept for `update`. `batches[k][r]` is micro-batch k of rank r, `first` the number of
        the first one among all of the training; losses come back in the same order.
        """
        ranks = self._recipe.ranks
        losses = [[math.nan] * ranks for _ in batches]
        total = self._sums_local if self.local else self._sums_sharded

        def run(k: int, r: int) -> dict[str, Tensor]:
            losses[k][r], grads = self._micro_batch(batches[k][r], first + k * ranks + r, r)
            return grads

        self._before, self._sizes = list(self._buffers), {}
        self._grads = total(run, len(batches))
        return losses

    def disturbed(
        self, batches: Sequence[Sequence[Any]], first: int
    ) -> tuple[list[list[float]], dict[str, Tensor], dict[str, Tensor]]:
        """Repeats the step with every weight changed by one unit in the last place, and restores everything. Returns
        losses, gradients (as `gradient` returns them) and rank 0's buffers.
        """
        kept = self._grads, self._before, self._buffers, self._sizes
        params = [p for p in self.worker.parameters() if p.is_floating_point()]
        weights = [p.detach().clone() for p in params]
        generator = torch.Generator().manual_seed(self._recipe.seed + self.steps)
        self._buffers = list(self._before)
        with torch.no_grad():
            for param in params:
                param.copy_(neighbours(param, generator))
        losses = self.gradients(batches, first)
        grads = {n: g for n in self.names if (g := self.gradient(n)) is not None}
        buffers = dict(self.values("buffer"))
        with torch.no_grad():
            for param, weight in zip(params, weights, strict=True):
                param.copy_(weight)
        self._grads, self._before, self._buffers, self._sizes = kept
        return losses, grads, buffers

    def sum_error(self, name: str, *, ordered: bool) -> float:
        """Returns a bound for the change of a gradient by another order of additions. `ordered`: whether sums over
        ranks are computed in fp32.
        """
        config, recipe = self.config, self._recipe
        if name not in self._grads:
            return 0.0
        added = [torch.float32, config.grad_dtype]
        if not ordered:
            computing = self.worker.get_parameter(name).dtype
            added += [config.communication_dtype or computing]
        unit = max(torch.finfo(dtype).eps for dtype in added)
        terms = recipe.ranks + recipe.micro_batches + 2
        size = (
            self._sizes.get(name, 0.0) / self.loss_scale / (recipe.ranks if config.reduce_op == "mean" else 1)
        )
        return terms * unit * size if math.isfinite(size) else math.inf

    def adopt_gradient(self, name: str, value: Tensor) -> None:
        """Replaces a gradient, in the form that `gradient` returns."""
        self._grads[name] = (value.detach() * self.loss_scale).to(self.config.grad_dtype)

    def update(self) -> None:
        """Clips and steps; with a loss scale, skips the step if the gradient is not finite."""
        square, finite = self._recipe.norms(list(self._grads.values()))
        norm = torch.tensor(math.sqrt(square) / self.loss_scale if finite else square, dtype=torch.float32)
        self.norm = float(norm)
        factor = float(clip_factor(norm, self._recipe.clip) * (1.0 / self.loss_scale))
        taken = self._counting is None or math.isfinite(self.norm)
        if self._counting is not None and not (not taken and self._counting.at_minimum):
            self._counting.update(overflow=not taken)
        if taken:
            self._step(factor)
        self.skipped += not taken
        self._grads = {}
        self.steps += 1

    def values(self, kind: str = "parameter") -> Mapping[str, Tensor]:
        """Parameters as checkpoints have them (masters in fp32, others as they compute), or rank 0's buffers."""
        if kind == "buffer":
            return self._buffers[0] if self._buffers else {}
        trained = set(self.names)
        computing = dict(self.worker.named_parameters())
        return {
            n: (p if n in trained else computing[n]).detach().float()
            for n, p in self.keeper.named_parameters()
        }

    def gradient(self, name: str) -> Tensor | None:
        """Returns a gradient before clipping, without the loss scale; None if no micro-batch used the parameter."""
        grad = self._grads.get(name)
        return None if grad is None else grad.float() * (1.0 / self.loss_scale)

    def adopt(self, name: str, value: Tensor) -> None:
        """Replaces the value of a parameter."""
        with torch.no_grad():
            for model in (self.keeper, self.worker):
                param = model.get_parameter(name)
                param.copy_(value)

    def states(self) -> list[tuple[str, str]]:
        """Names of parameters and of what the optimizer keeps for them."""
        params = dict(self.keeper.named_parameters())
        return [(n, kind) for n in self.names for kind, v in self._held(params[n]).items() if _is_value(v)]

    def state(self, name: str, kind: str) -> Tensor:
        """Returns the value of one of `states`."""
        return torch.as_tensor(self._held(self.keeper.get_parameter(name))[kind])

    def adopt_state(self, name: str, kind: str, value: Tensor) -> None:
        """Replaces the value of an optimizer state."""
        held = self._held(self.keeper.get_parameter(name))
        if isinstance(held[kind], Tensor):
            held[kind].copy_(value)
        else:
            held[kind] = type(held[kind])(value.item())

    def _held(self, param: Tensor) -> dict[str, Any]:
        states: dict[str, Any] = self.optimizer.state.get(param, {})
        return states

    # --- inside

    def _micro_batch(self, batch: Any, number: int, rank: int) -> tuple[float, dict[str, Tensor]]:
        self.worker.zero_grad(set_to_none=True)
        self._use_buffers(rank)
        seed_everything(self._recipe.seed, number)
        before = torch.get_rng_state()
        loss = self._recipe.loss(self._recipe.dress(self.worker, lambda: self.steps), batch)
        part = loss / self._recipe.micro_batches
        if self._counting is not None:
            part = (part if part.dtype == torch.float64 else part.float()) * self.loss_scale
        part.backward()
        self.draws = self.draws or not torch.equal(before, torch.get_rng_state())
        self._keep_buffers(rank)
        params = dict(self.worker.named_parameters())
        grads = {}
        for name in self.names:
            grad = params[name].grad
            if grad is not None:
                grads[name] = grad.to_dense() if grad.is_sparse else grad.detach()
                size = float(grads[name].abs().max()) if grads[name].numel() else 0.0
                self._sizes[name] = self._sizes.get(name, 0.0) + size
                params[name].grad = None
        return loss.item(), grads

    def _sums_local(self, run: Callable[[int, int], dict[str, Tensor]], micros: int) -> dict[str, Tensor]:
        """Adds the micro-batches of each rank, then reduces once."""

        def one_rank(rank: int) -> dict[str, Tensor]:
            if micros == 1:
                return run(0, rank)
            sums: dict[str, LineSum] = {}
            for k in range(micros):
                for name, grad in run(k, rank).items():
                    sums.setdefault(name, LineSum(self.config.grad_dtype)).push(grad)
            return {name: one.total() for name, one in sums.items()}

        return {n: g.to(self.config.grad_dtype) for n, g in self._reduced(one_rank).items()}

    def _sums_sharded(self, run: Callable[[int, int], dict[str, Tensor]], micros: int) -> dict[str, Tensor]:
        """Reduces every micro-batch, then adds the results."""
        sums: dict[str, LineSum | TreeSum] = {}
        for k in range(micros):
            for name, grad in self._reduced(partial(run, k)).items():
                new = TreeSum() if self.config.rank_invariant else LineSum(self.config.grad_dtype)
                sums.setdefault(name, new).push(grad)
        return {name: one.total() for name, one in sums.items()}

    def _reduced(self, of_rank: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The mean over ranks, computed as the reduction does: [Note: predivided mean] in
        `runtime/gradients/reduce_bucket.py`. A rank without a gradient contributes zeros.
        """
        config, ranks = self.config, self._recipe.ranks
        sums: dict[str, TreeSum] = {}
        for r in range(ranks):
            grads = of_rank(r)
            for name in {**sums, **grads}:
                part = self._travelling(grads[name]) if name in grads else None
                if name not in sums:
                    assert part is not None
                    sums[name] = TreeSum()
                    for _ in range(r):
                        sums[name].push(torch.zeros_like(part))
                sums[name].push(sums[name].nothing() if part is None else part)
        mean = config.reduce_op == "mean"
        factor = config.predivide_factor / (ranks if mean else 1)
        return {n: s.total() * factor if factor != 1.0 else s.total() for n, s in sums.items()}

    def _travelling(self, grad: Tensor) -> Tensor:
        config = self.config
        if config.predivide_factor != 1.0:
            grad = grad * (1.0 / config.predivide_factor)
        return grad.to(config.communication_dtype or grad.dtype).float()

    def _step(self, factor: float) -> None:
        params = dict(self.keeper.named_parameters())
        fused = isinstance(self.optimizer, FusedStep)
        for name, grad in self._grads.items():
            # An optimizer with one pass multiplies what it has widened; others find the product in the sums' dtype.
            scaled = grad.float() * factor if fused else (grad * factor).float()
            params[name].grad = (scaled if factor != 1.0 else grad.float()).to(params[name].device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._schedule is not None:
            self._schedule.step()
        self._publish()

    def _publish(self) -> None:
        """Copies masters to the parameters of the model that computes."""
        if self.worker is self.keeper:
            return
        masters = dict(self.keeper.named_parameters())
        with torch.no_grad():
            for name, param in self.worker.named_parameters():
                if name in self.names and name not in self._split:
                    param.copy_(masters[name])
        self._publish_split(self.worker)

    def _publish_split(self, worker: nn.Module) -> None:
        """Copies masters that are split to the parameters of `worker`, with ties away from zero."""
        splits = splits_masters(self.optimizer)
        masters = dict(self.keeper.named_parameters())
        with torch.no_grad():
            for name, param in worker.named_parameters():
                if name in self._split:
                    assert splits is not None
                    param.copy_(splits.split_master(masters[name].detach())[0])

    def _use_buffers(self, rank: int) -> None:
        if self._buffers:
            with torch.no_grad():
                for name, buffer in self.worker.named_buffers():
                    buffer.copy_(self._buffers[rank][name])

    def _keep_buffers(self, rank: int) -> None:
        if self._buffers:
            self._buffers[rank] = self._copied_buffers()


def neighbours(value: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the next representable number above or below each element, at random; zeros stay."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    up = torch.rand(value.shape, generator=generator).to(value.device) < 0.5
    raw = value.detach().contiguous().view(bits)
    moved = torch.where(up, raw + 1, raw - 1).view(value.dtype)
    return torch.where((value == 0) | ~value.isfinite() | ~moved.isfinite(), value, moved)


def _is_value(held: Any) -> bool:
    return isinstance(held, (Tensor, int, float)) and not isinstance(held, bool)
