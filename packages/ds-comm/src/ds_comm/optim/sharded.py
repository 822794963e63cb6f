"""Optimizers with ZeRO stage 1: states and masters divided among the ranks, one bit an element both ways."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_comm.compress.feedback import ErrorFeedback
from ds_comm.exchange import wire
from ds_comm.optim.base import ReducingOptimizer, StepReport, clip_factor, evaluated
from ds_comm.optim.flat import FlatLayout
from ds_comm.optim.options import CompressionOptions
from ds_core import kernels

SHARDED_KEY = "sharded"
_LOCAL_MOMENTUM = "local_momentum"
_LOCAL_DTYPE = torch.bfloat16
"""In fp32 the loss ended no lower, and this takes 2 bytes of every element on every rank."""


@dataclass(frozen=True)
class Segment:
    """The part of a parameter that this rank owns."""

    index: int
    """Of the parameter, over all groups."""
    inside: slice
    """Elements of the flattened parameter."""
    owned: slice
    """The same elements in this rank's part."""


class ShardedOptimizer(ReducingOptimizer):
    """Base of 1-bit optimizers whose states and fp32 masters are divided among the ranks, as by ZeRO stage 1.

    Each rank owns a part of all elements. For `freeze_step` updates gradients are reduced to the owner, which steps
    its masters and sends the new values: the bytes of an all-reduce. Then

    1. each rank adds its own gradient to a momentum of its own, and sends it with one bit an element, with error
       feedback, to the owners;
    2. the owner averages them, steps its master, and sends one bit an element of the difference between the master and
       the parameter that all ranks have. What that bit loses stays in the difference.

    What is compressed so differs from the papers: momenta of which each is that of one rank's gradients, because a rank
    no longer has the averaged momentum of others' parts, and changes of parameters instead of the averaged momentum.
    Not divided: the parameters, the momentum of a rank's own gradients (bf16), and its residual. docs/design/ds-comm.md
    says why.

    Use no DistributedDataParallel; `param.grad` is this rank's own gradient, and `step` is collective. All parameters
    must be on one device. Those that have no gradient on any rank are skipped in the first phase; in the second one a
    missing gradient counts as zeros. Whoever writes parameters between two steps of the second phase must load a state,
    or make a new optimizer: masters differ from parameters there, so that it is not noticed.
    """

    state_names: ClassVar[tuple[str, ...]] = ("master", "exp_avg", "exp_avg_sq")
    """The divided states."""
    number_names: ClassVar[tuple[str, ...]] = ()
    """States that are one number for each parameter, the same on all ranks."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        freeze_step: int,
        max_grad_norm: float = 0.0,
        group: dist.ProcessGroup | None = None,
        compression: CompressionOptions | None = None,
    ) -> None:
        self._steps: list[int] = []
        self._params: list[Tensor] = []
        self._parts: dict[str, Tensor] = {}
        """Name of a state -> its values in this rank's part."""
        self._numbers: dict[str, list[float]] = {}
        """Name of a state of one number a parameter -> the numbers; NaN: none yet."""
        self._local_momentum: Tensor | None = None
        """Of this rank's own gradients; None: not since the variance was frozen, or since it was loaded."""
        self._calls = 0
        super().__init__(
            params,
            defaults,
            freeze_step=freeze_step,
            max_grad_norm=max_grad_norm,
            group=group,
            compression=compression,
        )

    # -- implemented by a subclass

    @abstractmethod
    def _update_dense(self, mean: Tensor, present: Sequence[bool], clip: float) -> None:
        """Steps this rank's masters by the mean gradient of its part, times `clip`; parameters that no rank has a
        gradient for are skipped.
        """

    @abstractmethod
    def _update_compressed(self, mean: Tensor) -> None:
        """Steps this rank's masters by the mean of the ranks' compressed momenta in its part."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group before the first step; later, parts of the ranks are fixed, and RuntimeError is raised."""
        if self._params:
            raise RuntimeError(
                f"{type(self).__name__}: parameters cannot be added after the first step or after a state was loaded, "
                "because every rank owns a part of all of them; make a new optimizer"
            )
        super().add_param_group(param_group)

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in a step of the compressed phase, by formula, without flags; 0 before the first
        step.
        """
        if not self._params or self.channel.world_size == 1:
            return 0
        return wire.two_phase_bytes(self._part_bytes, self.channel.rank)

    @property
    def num_state_bytes(self) -> int:
        """Bytes of this rank's states: its parts of masters, momentum and variance, its own momentum and residual."""
        if not self._params:
            return 0
        local = 0 if self._local_momentum is None else self._local_momentum.nbytes
        return sum(part.nbytes for part in self._parts.values()) + local + self._feedback.worker.nbytes

    @property
    def _master(self) -> Tensor:
        return self._parts["master"]

    # -- layout

    def _prepare(self) -> None:
        """Divides the elements among ranks, and makes states; once."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if self._params:
            if len(params) != len(self._params) or any(
                p is not q for p, q in zip(params, self._params, strict=False)
            ):
                raise RuntimeError(
                    f"{type(self).__name__}: the parameters that require a gradient have changed since the first step; "
                    "freeze parameters before it, or make a new optimizer"
                )
            return
        if not params:
            raise ValueError(f"{type(self).__name__}: no parameter requires a gradient")
        compressor = self.compression.compressor
        self._layout = FlatLayout(params, compressor.block_numel)
        self._feedback = ErrorFeedback(
            compressor,
            self._layout.blocks,
            rank=self.channel.rank,
            world_size=self.channel.world_size,
            device=params[0].device,
            dtype=self.compression.residual_dtype,
        )
        self._part_bytes = [compressor.payload_bytes(part) for _, part in self._feedback.parts]
        numel = self._feedback.parts[self.channel.rank][1].numel
        self._segments = list(self._cut())
        self._parts = {
            name: torch.zeros(numel, dtype=torch.float32, device=params[0].device)
            for name in self.state_names
        }
        self._numbers = {name: [math.nan] * len(params) for name in self.number_names}
        self._feedback.server = self._feedback.server[
            :0
        ]  # the difference of master and parameter takes its place
        self._params, self._steps = params, [0] * len(params)
        self._master.copy_(self._own_values())

    def _cut(self) -> Iterator[Segment]:
        start, blocks = self._feedback.parts[self.channel.rank]
        for index, (offset, numel) in enumerate(zip(self._layout.offsets, self._layout.numels, strict=True)):
            first, last = max(start, offset), min(start + blocks.numel, offset + numel)
            if first < last:
                yield Segment(index, slice(first - offset, last - offset), slice(first - start, last - start))

    def _own_values(self) -> Tensor:
        """The values of this rank's part, as all ranks have them."""
        values = torch.zeros_like(self._master)
        for segment in self._segments:
            values[segment.owned] = self._params[segment.index].detach().reshape(-1)[segment.inside]
        return values

    def _groups(self) -> list[dict[str, Any]]:
        """The group of each parameter."""
        return [group for group in self.param_groups for p in group["params"] if p.requires_grad]

    # -- stepping

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Reduces, and updates all parameters. Collective. `closure` re-evaluates the model and returns the loss."""
        loss = evaluated(closure)
        self._prepare()
        unscale = self._unscale()
        skipped, squared, present = self._agree(unscale)
        if skipped:
            self.report = StepReport(skipped=True, grad_norm=math.inf, clip_factor=0.0)
            return loss
        self._calls += 1
        dense = max(self._steps) < self.freeze_step
        if dense:
            self._dense_step(unscale, present)
        else:
            norm = math.sqrt(squared)
            clip = clip_factor(norm, self.max_grad_norm)
            self._compressed_step(clip * unscale)
            self.report = StepReport(skipped=False, grad_norm=norm, clip_factor=clip)
        self._steps = [n + (has or not dense) for n, has in zip(self._steps, present, strict=True)]
        return loss

    def _agree(self, unscale: float) -> tuple[bool, float, list[bool]]:
        """One small all-reduce: whether any gradient is not finite, the mean over ranks of their squared norms, which
        parameters have a gradient on some rank.
        """
        own, finite = kernels.squared_norm([p.grad.contiguous() for p in self._params if p.grad is not None])
        bad = not finite or bool(self.found_inf)
        numbers = [float(bad), 0.0 if bad else own * unscale * unscale]
        flags = torch.tensor(numbers + [float(p.grad is not None) for p in self._params], dtype=torch.float32)
        flags = flags.to(self._params[0].device)
        self.channel.all_reduce(flags).wait()
        values = flags.tolist()
        return values[0] > 0, values[1] / self.channel.world_size, [value > 0 for value in values[2:]]

    def _flat_gradients(self, factor: float) -> Tensor:
        flat = torch.zeros(self._feedback.numel, dtype=torch.float32, device=self._params[0].device)
        for param, view in zip(self._params, self._layout.views(flat), strict=True):
            if param.grad is not None:
                view.copy_(param.grad)
        return flat.mul_(factor) if factor != 1.0 else flat

    def _adopt_written(self) -> None:
        """Takes the values of parameters that were written since the last step, for example by loading a model."""
        for segment in self._segments:
            values = self._params[segment.index].detach().reshape(-1)[segment.inside]
            if not torch.equal(values, self._master[segment.owned].to(values.dtype)):
                self._master[segment.owned] = values.to(torch.float32)

    def _dense_step(self, unscale: float, present: Sequence[bool]) -> None:
        self._adopt_written()
        mean = self._reduce_scatter(self._flat_gradients(unscale))
        total = torch.tensor([kernels.squared_norm([mean])[0]], dtype=torch.float64)
        total = total.to(mean.device, torch.float32)
        self.channel.all_reduce(total).wait()
        norm = math.sqrt(float(total))
        clip = clip_factor(norm, self.max_grad_norm)
        self._update_dense(mean, present, clip)
        self._publish_whole()
        self.report = StepReport(skipped=False, grad_norm=norm, clip_factor=clip)

    def _reduce_scatter(self, flat: Tensor) -> Tensor:
        """The mean over ranks of this rank's part; sums are in order of rank."""
        world = self.channel.world_size
        sent = flat.to(self.compression.reduce_dtype)
        sizes = [part.numel * sent.element_size() for _, part in self._feedback.parts]
        own = self._master.numel()
        received = torch.empty(world * own, dtype=sent.dtype, device=flat.device)
        own_bytes = [own * sent.element_size()] * world
        self.channel.all_to_all(received.view(torch.uint8), sent.view(torch.uint8), sizes, own_bytes).wait()
        total = torch.zeros_like(self._master)
        for part in received.view(world, own):
            total.add_(part)
        return total.div_(world)

    def _publish_whole(self) -> None:
        """Sends this rank's masters, in the dtype of the parameters if all have the same, else in fp32."""
        dtypes = {p.dtype for p in self._params}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        whole = self._gathered(self._master.to(dtype))
        for param, view in zip(self._params, self._layout.views(whole), strict=True):
            param.detach().copy_(view)

    def _compressed_step(self, factor: float) -> None:
        self._update_compressed(self._send_momenta(self._with_momentum(self._flat_gradients(factor))))
        self._publish_changes()

    def _with_momentum(self, flat: Tensor) -> Tensor:
        """Adds this rank's gradients to the momentum of its own. Returns it in fp32."""
        if self._local_momentum is None:
            self._local_momentum = self._averaged_momentum()
        views = zip(
            self._groups(), self._layout.views(flat), self._layout.views(self._local_momentum), strict=True
        )
        for group, own, kept in views:
            beta1 = float(group["betas"][0])
            own.mul_(1.0 - beta1).add_(kept.to(torch.float32), alpha=beta1)
            kept.copy_(own)
        return flat

    def _averaged_momentum(self) -> Tensor:
        """The averaged momentum of all elements, with which each rank's own one begins. Collective."""
        return self._gathered(self._parts["exp_avg"].to(_LOCAL_DTYPE))

    def _gathered(self, own: Tensor) -> Tensor:
        """The parts of all ranks in one tensor. Collective."""
        whole = torch.empty(self._feedback.numel, dtype=own.dtype, device=own.device)
        sizes = [part.numel * own.element_size() for _, part in self._feedback.parts]
        self.channel.all_gather(whole.view(torch.uint8), own.view(torch.uint8), sizes).wait()
        return whole

    def _send_momenta(self, flat: Tensor) -> Tensor:
        """First phase: returns the mean of what the ranks' compressed momenta are in this rank's part."""
        feedback, world = self._feedback, self.channel.world_size
        compressor, own = feedback.compressor, self._part_bytes[self.channel.rank]
        sent = torch.empty(sum(self._part_bytes), dtype=torch.uint8, device=flat.device)
        received = torch.empty(own * world, dtype=torch.uint8, device=flat.device)
        for (start, blocks), payload in zip(feedback.parts, sent.split(self._part_bytes), strict=True):
            if len(blocks):
                here = slice(start, start + blocks.numel)
                residual = feedback.worker[here]
                compressor.encode(flat[here], payload, blocks, residual=residual, seed=self._seed(start))
        self.channel.all_to_all(received, sent, self._part_bytes, [own] * world).wait()
        mean = torch.zeros_like(self._master)
        blocks = feedback.parts[self.channel.rank][1]
        if len(blocks):
            for rank, payload in enumerate(received.split(own)):
                compressor.decode(payload, mean, blocks, weight=1.0 / world, add=rank > 0)
        return mean

    def _publish_changes(self) -> None:
        """Second phase: sends the difference between masters and parameters, and adds what all ranks decode."""
        feedback = self._feedback
        compressor, blocks = feedback.compressor, feedback.parts[self.channel.rank][1]
        own = torch.zeros(self._part_bytes[self.channel.rank], dtype=torch.uint8, device=self._master.device)
        if len(blocks):
            change = self._master - self._own_values()
            compressor.encode(change, own, blocks, seed=self._seed(-1))
        gathered = torch.empty(sum(self._part_bytes), dtype=torch.uint8, device=own.device)
        self.channel.all_gather(gathered, own, self._part_bytes).wait()
        decoded = torch.zeros(feedback.numel, dtype=torch.float32, device=own.device)
        for (start, part), payload in zip(feedback.parts, gathered.split(self._part_bytes), strict=True):
            if len(part):
                compressor.decode(payload, decoded[start : start + part.numel], part)
        for param, view in zip(self._params, self._layout.views(decoded), strict=True):
            param.detach().copy_(param.detach().to(torch.float32) + view)

    def _seed(self, place: int) -> int:
        return (self._calls * 0x9E3779B97F4A7C15 + (self.channel.rank << 40) + place) % 2**64

    # -- states

    def state_dict(self) -> dict[str, Any]:
        """Returns the groups, and this rank's part of the states. It loads on the same rank of as many;
        `merge_states` makes one for any number of ranks.
        """
        return {**super().state_dict(), SHARDED_KEY: self._own_state()}

    def _own_state(self) -> dict[str, Any] | None:
        if not self._params:
            return None
        return {
            "form": "rank",
            "rank": self.channel.rank,
            "world_size": self.channel.world_size,
            "numel": self._feedback.numel,
            "start": self._feedback.server_start,
            "steps": list(self._steps),
            "worker": self._feedback.worker,
            _LOCAL_MOMENTUM: self._local_momentum,
            "numbers": {name: list(values) for name, values in self._numbers.items()},
            **self._parts,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads `state_dict()` of the same rank of as many, or `merge_states(...)`, after the model's parameters."""
        if SHARDED_KEY not in state_dict:
            raise ValueError(
                f"{type(self).__name__}: this state has no parts of ranks: it is that of another optimizer; begin "
                "without it"
            )
        own = state_dict[SHARDED_KEY]
        here = (self.channel.rank, self.channel.world_size)
        if own is not None and own["form"] == "rank" and (own["rank"], own["world_size"]) != here:
            raise ValueError(
                f"{type(self).__name__}: the state is that of rank {own['rank']} of {own['world_size']}, but this is "
                f"rank {here[0]} of {here[1]}; merge the states of all ranks first (merge_states)"
            )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != SHARDED_KEY})
        if own is not None:
            self._load_own(own)

    def _load_own(self, own: Mapping[str, Any]) -> None:
        self._prepare()
        missing = [name for name in self.state_names if name not in own]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: the saved states lack {missing[0]!r}: they are those of another optimizer; "
                "begin without them"
            )
        if own["numel"] != self._feedback.numel or len(own["steps"]) != len(self._steps):
            raise ValueError(
                f"{type(self).__name__}: the saved states have {own['numel']} elements of {len(own['steps'])} "
                f"parameters, but these have {self._feedback.numel} of {len(self._steps)}; use the model that was saved"
            )
        self._steps = list(own["steps"])
        self._feedback.worker.copy_(own["worker"])
        # Merged states have none: it begins with the average again.
        local = own.get(_LOCAL_MOMENTUM)
        self._local_momentum = (
            None if local is None else local.to(self._master.device, _LOCAL_DTYPE, copy=True)
        )
        first = self._feedback.server_start - own["start"]
        for name, part in self._parts.items():
            part.copy_(own[name][first : first + part.numel()])
        for name in self.number_names:
            self._numbers[name] = list(own["numbers"][name])

    def residuals(self) -> dict[str, Any] | None:
        """Returns this rank's part of the states, for a checkpoint that has the parameters; None before the first
        step.
        """
        return self._own_state()

    def load_residuals(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Loads `residuals()` of all ranks that saved them, after the parameters. As many ranks as then only need their
        own. Empty: begins without states.
        """
        here = (self.channel.rank, self.channel.world_size)
        own = [s for s in states if s["form"] == "rank" and (s["rank"], s["world_size"]) == here]
        if states:
            self._load_own(own[0] if own else merge_sharded_states(states))
        else:
            self._params, self._steps, self._local_momentum = [], [], None

    def planned_states(self, num_ranks: int) -> Mapping[str, tuple[torch.dtype, float]]:
        """Returns the states in a job of so many ranks: name -> dtype, and number of elements for each element of a
        parameter.
        """
        divided = dict.fromkeys(self.state_names, (torch.float32, 1.0 / num_ranks))
        residual = (self.compression.residual_dtype, 1.0)
        return {**divided, _LOCAL_MOMENTUM: (_LOCAL_DTYPE, 1.0), "worker_residual": residual}


def merge_sharded_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges what a sharded optimizer saved on all ranks: parts are put together, residuals averaged.

    Raises ValueError if the states are not those of all ranks of one group.
    """
    ordered = sorted(states, key=lambda state: int(state["rank"]))
    if [state["rank"] for state in ordered] != list(range(states[0]["world_size"])):
        raise ValueError(
            f"merging needs the states of all {states[0]['world_size']} ranks, each once; given were those of ranks "
            f"{[state['rank'] for state in states]}"
        )
    of_ranks = ("worker", _LOCAL_MOMENTUM)
    names = [name for name, value in ordered[0].items() if isinstance(value, Tensor) and name not in of_ranks]
    whole = {name: torch.cat([state[name].to("cpu") for state in ordered]) for name in names}
    worker = torch.stack([state["worker"].to("cpu", torch.float32) for state in ordered]).mean(0)
    return {**ordered[0], "form": "whole", "start": 0, "worker": worker, _LOCAL_MOMENTUM: None, **whole}
