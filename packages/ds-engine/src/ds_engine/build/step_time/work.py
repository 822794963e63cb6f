"""What a step of a job computes, sends and copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import ds_zero
from ds_engine.build.memory.model_axes import ModelAxes
from ds_engine.job import Job
from ds_engine.step_time import Inside, Unit, Workload
from ds_zero.layout.units import choose_units
from ds_zero.predict.dry_run import dry_run
from ds_zero.predict.plan import default_loss


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """The operations of one micro-batch, by unit."""

    units: tuple[Unit, ...]
    samples: int
    """Of the micro-batch that was counted."""
    inside: tuple[Inside, ...] = ()
    """Messages within the layers of the model, of this micro-batch."""

    def inside_of(self, samples: int, *, itemsize: int = 4, recomputed: bool = False) -> tuple[Inside, ...]:
        """The messages within layers for a micro-batch of another size.

        Args:
            itemsize: bytes of an element in training; they were counted in fp32.
        """
        factor = samples / self.samples * itemsize / 4
        return tuple(
            replace(
                one,
                forward_bytes=one.forward_bytes * factor,
                backward_bytes=(one.backward_bytes + (one.forward_bytes if recomputed else 0.0)) * factor,
                backward_messages=one.backward_messages + (one.forward_messages if recomputed else 0),
            )
            for one in self.inside
        )

    def of(self, samples: int, *, recomputed: bool = False) -> tuple[Unit, ...]:
        """The units for a micro-batch of another size.

        Args:
            recomputed: the forward of each unit runs again in the backward.
        """
        factor = samples / self.samples
        return tuple(
            Unit(
                name=unit.name,
                numel=unit.numel,
                forward_flops=unit.forward_flops * factor,
                backward_flops=(unit.backward_flops + (unit.forward_flops if recomputed else 0.0)) * factor,
            )
            for unit in self.units
        )

    def flops(self, samples: int) -> tuple[float, float]:
        """Operations of forward and backward of a micro-batch."""
        units = self.of(samples)
        return sum(unit.forward_flops for unit in units), sum(unit.backward_flops for unit in units)


def work_of(model: nn.Module, inputs: Any, samples: int, axes: ModelAxes | None = None) -> ModelWork:
    """Counts the operations and the messages of one forward and backward. Nothing is computed.

    Args:
        model: on any device, also the meta device; of one rank, if it is divided.
        inputs: arguments of a forward: a tensor, a tuple, or a mapping of keywords.
        samples: size of this micro-batch.
        axes: the groups over which the model is divided; None: it is not.

    Raises:
        ValueError: ds-profiler is not installed, or the model needs values of tensors.
    """
    if inputs is None:
        raise ValueError(
            "predicting the time needs the inputs of a forward: return (model, inputs) from the function"
        )
    try:
        from ds_profiler import FlopsProfiler
    except ModuleNotFoundError:
        raise ValueError("predicting the time needs ds-profiler: pip install 'ds-engine[profiler]'") from None
    axes = axes or ModelAxes()
    axes.clear()
    try:
        with dry_run(model) as copied:
            batch = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"), inputs)
            profiler = FlopsProfiler(copied, synchronize=False)
            with profiler:
                loss = default_loss(call(copied, batch))
                forward_sent = axes.counted()
                loss.backward()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        text = str(error).partition("\n")[0]
        raise ValueError(
            f"the operations of {type(model).__name__} cannot be counted without values: {text}"
        ) from error
    profile = profiler.profile()
    modules = {module.name: module for _, module in profile.model.walk()}
    chosen = choose_units(model)
    units, forward, backward = [], float(profile.forward.flops), float(profile.backward.flops)
    for name, module in chosen.items():
        counted = modules.get(name)
        inner = sum(p.numel() for p in module.parameters())
        if counted is None or not name:
            continue
        units.append(
            Unit(
                name=name,
                numel=inner,
                forward_flops=float(counted.forward.flops),
                backward_flops=float(counted.backward.flops),
            )
        )
        forward -= counted.forward.flops
        backward -= counted.backward.flops
    total = sum(p.numel() for p in model.parameters())
    rest = max(0, total - sum(unit.numel for unit in units))
    if forward > 0 or backward > 0 or rest or not units:
        # What no unit contains, such as a loss in the model's own forward, runs last.
        units.append(
            Unit(name="", numel=rest, forward_flops=max(forward, 0.0), backward_flops=max(backward, 0.0))
        )
    return ModelWork(units=tuple(units), samples=samples, inside=_inside(axes, forward_sent))


def _inside(axes: ModelAxes, forward: Mapping[str, tuple[float, int]]) -> tuple[Inside, ...]:
    """What has been sent since `ModelAxes.clear`, of which `forward` was sent in the forward."""
    return tuple(
        Inside(
            axis=axis,
            ranks=axes.sizes()[axis],
            forward_bytes=forward[axis][0],
            forward_messages=forward[axis][1],
            backward_bytes=num_bytes - forward[axis][0],
            backward_messages=messages - forward[axis][1],
        )
        for axis, (num_bytes, messages) in axes.counted().items()
    )


def call(model: Callable[..., Any], batch: Any) -> Any:
    """Calls a model, or an engine, with a tensor, a tuple of arguments, or a mapping of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def workload(job: Job, plan: ds_zero.Plan, work: ModelWork, samples: int | None = None) -> Workload:
    """Returns what a rank does in one step.

    Args:
        plan: the plan of the job, with messages (made with inputs).
        samples: size of the micro-batch. Default: that of the job.
    """
    micro = job.batch.steps
    sent = {phase: float(value) for phase, value in plan.sent_bytes.items()}
    every = plan.accumulation_plan == "sharded"
    reductions = micro if every else 1
    gathered = sent.get("forward", 0.0) / micro
    # At stage 3 the backward gathers as the forward does; the rest of what it sends are reductions.
    regathered = min(gathered, sent.get("backward", 0.0) / micro)
    reduced = max(0.0, sent.get("backward", 0.0) - regathered * micro) / reductions
    numel = plan.trainable_numel
    owned = numel / plan.ranks if plan.stage else float(numel)
    tensors = [tensor for tensor in plan.tensors if tensor.kind == "grad"]
    states = sum(tensor.num_bytes for tensor in plan.tensors if tensor.kind == "state")
    return Workload(
        units=work.of(samples or job.batch.micro, recomputed=plan.checkpointing),
        inside=work.inside_of(
            samples or job.batch.micro, itemsize=itemsize_of(plan), recomputed=plan.checkpointing
        ),
        ranks=plan.ranks,
        stride=job.topology.tensor.size,
        micro_batches=micro,
        gather_forward_bytes=gathered,
        gather_backward_bytes=regathered,
        reduce_bytes=reduced,
        reduce_every_micro_batch=every,
        buckets=max(1, len(tensors)),
        publish_bytes=sent.get("step", 0.0) if plan.stage in (1, 2) else 0.0,
        accumulate_bytes=bucketed_bytes(numel, micro),
        optimizer_bytes=update_bytes(owned, states, itemsize_of(plan)),
        shares_state=plan.stage > 0 and plan.ranks > 1,
        **_moved(plan, owned, states),
    )


def update_bytes(owned_numel: float, states_bytes: float, param_itemsize: int) -> float:
    """Memory that clipping and update of a rank read and write: the gradient twice, fp32 masters and states read and
    written, parameters written.
    """
    return owned_numel * (2 * 4 + 2 * 4 + param_itemsize) + 2 * states_bytes


def bucketed_bytes(numel: int, micro: int) -> float:
    """Bytes that each backward reads and writes for gradients: a copy into the bucket, or a sum."""
    return float(numel) * 4 * (3 if micro > 1 else 2)


def itemsize_of(plan: ds_zero.Plan) -> int:
    """Returns the bytes of an element of the parameters, and of activations."""
    names = [name.strip().removeprefix("torch.") for name in plan.compute_dtype.split(",")]
    sizes = [
        getattr(torch, name).itemsize for name in names if isinstance(getattr(torch, name, None), torch.dtype)
    ]
    return max(sizes, default=4)


def _moved(plan: ds_zero.Plan, owned: float, states: float) -> dict[str, float]:
    """Bytes between device and host, and to and from a disk, in one step."""
    host, disk = set(plan.offload), set(plan.disk)
    copies = 0.0
    if plan.device != "cpu" and (host or disk):
        # Gradients go to the host, parameters come back: full duplex, so the larger of the two counts.
        copies = owned * max(4, itemsize_of(plan))
    read = written = 0.0
    by_kind = {"master": owned * 4, "grad": owned * 4, "param": owned * itemsize_of(plan), "state": states}
    for kind in disk:
        read += by_kind.get(kind, 0.0)
        written += by_kind.get(kind, 0.0)
    return {"host_copy_bytes": copies, "disk_read_bytes": read, "disk_write_bytes": written}
