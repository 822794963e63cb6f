"""Measures the rates of this machine with the model itself, in as many processes as the job has ranks here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import ds_comm
import ds_zero
from ds_comm.bench import Timing
from ds_comm.bench import measure as measure_collectives
from ds_core.kernels import squared_norm
from ds_engine.build.optimizer import maker_of
from ds_engine.build.step_time.work import bucketed_bytes, call, update_bytes
from ds_engine.config import DsConfig
from ds_engine.device import synchronize
from ds_engine.job import Precision, choices_of
from ds_engine.step_time import Rates
from ds_engine.step_time.rates import fitted, rates_of
from ds_zero.predict.plan import default_loss

_ROUNDS = 5
_MESSAGES = (1 << 16, 1 << 24)
_UPDATE_NUMEL = 1 << 22
"""Elements of the update that is measured: 64 MB with states, more than most caches."""
_TENSORS = 16
"""Parameters into which they are divided."""


def calibrate(
    settings: DsConfig, where: str, tokens: int | None, samples: int, ranks: int, flops: tuple[float, float]
) -> Rates:
    """Starts `ranks` processes on this machine, and measures forward, backward, update and collectives in all of them
    at once. Takes some seconds for a small model.

    Args:
        where, tokens: what `ds plan --model` and `--tokens` name.
        samples: micro-batch that is measured.
        flops: operations of its forward and of its backward.

    Raises:
        ValueError: the model cannot be made with values, or its factory gives no inputs.
    """
    from ds_engine.launch import notebook

    told = notebook(measured, ranks, settings.model_dump(exclude_unset=True), where, tokens, samples)
    return rates_from(told, flops, settings)


def rates_from(told: Sequence[Mapping[str, Any]], flops: tuple[float, float], settings: DsConfig) -> Rates:
    """Returns the rates from what all ranks have measured; those of copies and disks are the configured ones."""
    # The slowest rank is the one that the others wait for.
    slowest = {
        name: max(one[name] for one in told)
        for name in ("forward_s", "backward_s", "few_forward_s", "few_backward_s")
    }
    first = told[0]
    memory = min(one["memory_bytes_per_s"] for one in told)
    # The backward was measured with its copies of gradients into buckets, which `simulate` adds to the operations.
    copies_s = min(bucketed_bytes(first["numel"], 1) / memory, slowest["few_backward_s"] / 2)
    sizes = (first["samples"], first["few_samples"])
    forward_s, forward_pass_s = _fitted_pass(slowest["forward_s"], slowest["few_forward_s"], sizes)
    backward_s, backward_pass_s = _fitted_pass(
        slowest["backward_s"] - copies_s, slowest["few_backward_s"] - copies_s, sizes
    )
    given: dict[str, Any] = {
        "forward_flops_per_s": flops[0] / forward_s,
        "backward_flops_per_s": flops[1] / backward_s,
        "forward_pass_s": forward_pass_s,
        "backward_pass_s": backward_pass_s,
        "memory_bytes_per_s": memory,
        "gather": first.get("gather", {"latency_s": 1e-5, "bytes_per_s": 1e10}),
        "reduce": first.get("reduce", {"latency_s": 1e-5, "bytes_per_s": 1e10}),
        "occupies": min(1.0, max(one["occupies"] for one in told)),
    }
    rates = settings.offload.rates
    return replace(
        rates_of(given),
        device_host_bytes_per_s=float(rates.link),
        disk_read_bytes_per_s=float(rates.disk_read),
        disk_write_bytes_per_s=float(rates.disk_write),
    )


def _fitted_pass(whole_s: float, few_s: float, sizes: tuple[int, int]) -> tuple[float, float]:
    """Divides the duration of a pass into a part that grows with the samples and one that every pass takes, by its
    durations with `sizes` samples. At most half counts as fixed, because measurements scatter.
    """
    samples, few = sizes
    if few == samples:
        return whole_s, 0.0
    growing_s = (whole_s - few_s) / (samples - few) * samples
    fixed_s = min(max(whole_s - growing_s, 0.0), whole_s / 2)
    return whole_s - fixed_s, fixed_s


def measured(config: dict[str, Any], where: str, tokens: int | None, samples: int) -> dict[str, Any]:
    """What one rank measures."""
    from ds_engine.build.memory.model_source import model_factory
    from ds_engine.config import load

    settings = load(config)
    world = ds_comm.start()
    torch.manual_seed(0)
    made = model_factory(where, tokens=tokens)()
    if not isinstance(made, tuple):
        raise ValueError(
            f"{where!r} gives no example inputs, so nothing can be measured: return (model, inputs)"
        )
    precision = Precision.of(settings, world.device.type)
    dtype = precision.param_dtype
    model = made[0].to(world.device, dtype).train()
    few = max(1, samples // 2)
    batches = [precision.cast(_batch(made[1], number, world.device)) for number in (samples, few)]
    told: dict[str, Any] = {
        "numel": sum(p.numel() for p in model.parameters()),
        "samples": samples,
        "few_samples": few,
    }
    with precision.around_forward(world.device.type):
        (whole, part) = _passes(model, batches, world.device, dtype)
    told |= whole | {f"few_{name}": seconds for name, seconds in part.items()}
    del model, batches
    told["memory_bytes_per_s"] = _update_rate(settings, world.device, dtype)
    told["occupies"] = 0.0
    if world.world_size > 1:
        told |= _messages(world.device)
    return told


def _batch(inputs: Any, samples: int, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: resized(tensor, samples).to(device), inputs)


def resized(tensor: Tensor, samples: int) -> Tensor:
    """The same samples again and again, or the first of them."""
    return tensor[torch.arange(samples) % tensor.shape[0]] if tensor.ndim else tensor


def _passes(
    model: nn.Module, batches: Sequence[Any], device: torch.device, dtype: torch.dtype | None
) -> list[dict[str, float]]:
    """Forward and backward of each batch as ds_zero runs them, without messages: each rank is alone."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    config = ds_zero.ZeroConfig(param_dtype=dtype)
    ds_zero.shard(model, optimizer, stage=0, mesh=_alone(), config=config)
    told = []
    for batch in batches:
        forwards, backwards = [], []
        for number in range(_ROUNDS + 1):
            _together(device)
            start = time.perf_counter()
            loss = default_loss(call(model, batch))
            synchronize(device)
            middle = time.perf_counter()
            loss.backward()
            synchronize(device)
            end = time.perf_counter()
            if number:  # the first allocates gradients
                forwards.append(middle - start)
                backwards.append(end - middle)
            optimizer.zero_grad()
        told.append({"forward_s": statistics.median(forwards), "backward_s": statistics.median(backwards)})
    ds_zero.destroy(model)
    return told


def _update_rate(settings: DsConfig, device: torch.device, dtype: torch.dtype | None) -> float:
    """Bytes per second of clipping and update with the job's optimizer, as `update_bytes` counts them. Each rank does
    it alone, so no message is part of the time.
    """
    model = nn.ParameterList(torch.zeros(_UPDATE_NUMEL // _TENSORS, device=device) for _ in range(_TENSORS))
    choices = choices_of(settings)
    make: Callable[[Any], torch.optim.Optimizer] = maker_of(choices, model) or torch.optim.AdamW
    config = ds_zero.ZeroConfig(param_dtype=dtype)
    _, optimizer = ds_zero.shard(
        model, make(list(model.parameters())), stage=0, mesh=_alone(), config=config, norms=squared_norm
    )
    seconds = []
    for _ in range(_ROUNDS + 1):
        torch.stack([param.sum() for param in model]).sum().backward()
        _together(device)
        start = time.perf_counter()
        ds_zero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    states = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.numel() >= _UPDATE_NUMEL // _TENSORS
    )
    ds_zero.destroy(model)
    itemsize = (dtype or torch.float32).itemsize
    return update_bytes(_UPDATE_NUMEL, states, itemsize) / statistics.median(seconds[1:])


def _alone() -> dist.ProcessGroup | None:
    """A group of this rank only; None if there are no others. Collective."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return dist.new_subgroups(group_size=1)[0] if several else None


def _messages(device: torch.device) -> dict[str, Any]:
    cpu, wall = time.process_time(), time.perf_counter()
    names = ("all_gather", "reduce_scatter", "all_to_all")
    timings = measure_collectives(_MESSAGES, names, rounds=3, device=device)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    # ds_zero reduces over gloo by all-to-all and a sum, because gloo's reduce-scatter sends twice the bytes.
    by_messages = device.type == "cpu" and all(t.transport != "same host" for t in timings)
    return {
        "gather": _fitted(timings, "all_gather"),
        "reduce": _fitted(timings, "all_to_all" if by_messages else "reduce_scatter"),
        "occupies": 0.0 if device.type != "cpu" else share,
    }


def _fitted(timings: Sequence[Timing], collective: str) -> dict[str, float]:
    return fitted(
        [
            {"bytes": t.num_bytes, "ranks": t.ranks, "seconds": t.seconds}
            for t in timings
            if t.collective == collective
        ]
    )


def _together(device: torch.device) -> None:
    """Ranks measure at the same time, since they share memory and cores."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    synchronize(device)
