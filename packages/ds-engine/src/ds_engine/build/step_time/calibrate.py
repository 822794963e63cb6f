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
from ds_core.kernels import squared_norm
from ds_engine.build.optimizer import maker_of
from ds_engine.build.step_time.links import measured_links
from ds_engine.build.step_time.work import bucketed_bytes, call, update_bytes
from ds_engine.config import DsConfig
from ds_engine.device import synchronize
from ds_engine.job import Precision, choices_of
from ds_engine.step_time import Rates
from ds_engine.step_time.rates import rates_of
from ds_zero.layout.units import choose_units
from ds_zero.predict.plan import default_loss

_ROUNDS = 5
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
    slowest = {name: max(one[name] for one in told) for name in told[0] if name.endswith("_s")}
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
    offload = settings.offload.rates
    rates = replace(
        rates_of(given),
        device_host_bytes_per_s=float(offload.link),
        disk_read_bytes_per_s=float(offload.disk_read),
        disk_write_bytes_per_s=float(offload.disk_write),
        update_s=max(0.0, slowest["update_s"] - first["update_bytes"] / memory),
    )
    return rates if len(told) == 1 else _with_sharding(rates, slowest, first, len(told))


def _with_sharding(rates: Rates, slowest: Mapping[str, float], first: Mapping[str, Any], ranks: int) -> Rates:
    """Returns the rates with what stage 3 took in addition to its messages: in the forward for each unit, and in the
    update.
    """
    units = max(1, first["units"])
    gathers_s = rates.gather.seconds(first["numel"] * first["itemsize"] * (ranks - 1) / ranks, ranks, units)
    # The first gather is waited for; of the others as much as occupies the rank, or is longer than the forward.
    hidden = max(rates.occupies * gathers_s, gathers_s - slowest["few_forward_s"], gathers_s / units)
    more_s = slowest["sharded_forward_s"] - slowest["few_forward_s"] - hidden
    shared_s = slowest["sharded_update_s"] - rates.update_s
    shared_s -= first["update_bytes"] / ranks / rates.memory_bytes_per_s
    return replace(rates, gather_unit_s=max(0.0, more_s / units), shared_update_s=max(0.0, shared_s))


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
    few = max(1, samples // 2)
    batches = [_batch(made[1], number, world.device) for number in (samples, few)]
    told: dict[str, Any] = {"samples": samples, "few_samples": few}
    memory = _update_rate(settings, world.device, Precision.of(settings, world.device.type).param_dtype)
    engines = [_engine(settings, made[0], stage=0)]
    if world.world_size > 1:
        # Stage 3 needs another model: the first one's parameters are in the first engine's buckets.
        engines.append(_engine(settings, model_factory(where, tokens=tokens)()[0], stage=3))
    told |= _engine_times(engines, batches)
    told |= _sizes(engines[0])
    for engine in engines:
        engine.destroy()
    told |= {"memory_bytes_per_s": memory, "occupies": 0.0}
    if world.world_size > 1:
        told |= measured_links(world.device)
    return told


def _batch(inputs: Any, samples: int, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: resized(tensor, samples).to(device), inputs)


def resized(tensor: Tensor, samples: int) -> Tensor:
    """The same samples again and again, or the first of them."""
    return tensor[torch.arange(samples) % tensor.shape[0]] if tensor.ndim else tensor


_KEPT = ("optimizer", "bf16", "fp16", "torch_autocast", "data_types", "gradient_clipping")
"""Sections of the job's configuration with which passes and updates are measured."""


def _engine(settings: DsConfig, model: nn.Module, stage: int) -> Any:
    """Returns an engine whose steps have two micro-batches, with the job's optimizer and precision."""
    from ds_engine.assemble import initialize

    given = settings.model_dump(exclude_unset=True)
    config = {name: given[name] for name in _KEPT if name in given} | {
        "train_micro_batch_size_per_gpu": 1,  # the batches have their own sizes
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "startup_summary": False,
        "steps_per_print": 0,
    }
    return initialize(model, config)[0]


def _engine_times(engines: Sequence[Any], batches: Sequence[Any]) -> dict[str, float]:
    """Durations of forward, backward and update. Those of passes are of the first micro-batch of a step, which at stage
    0 sends nothing. Names of the second batch begin with `few_`, and those of the second engine, which runs only this
    batch, with `sharded_`. All take turns, so that other work on the machine affects them alike.
    """
    runs = [("", engines[0], batches[0]), ("few_", engines[0], batches[1])]
    runs += [("sharded_", engine, batches[1]) for engine in engines[1:]]
    taken: dict[str, list[float]] = {}
    for number in range(_ROUNDS + 1):
        for prefix, engine, batch in runs:
            for name, seconds in _step_times(engine, batch).items():
                if number:  # the first step allocates gradients and states
                    taken.setdefault(prefix + name, []).append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def _step_times(engine: Any, batch: Any) -> dict[str, float]:
    """Runs one step of two micro-batches. Returns the durations of the first one's passes, and of the update."""
    device, told = engine.world.device, {}
    for turn in range(2):
        _together(device)
        start = time.perf_counter()
        loss = default_loss(call(engine, batch))
        synchronize(device)
        middle = time.perf_counter()
        engine.backward(loss)
        synchronize(device)
        end = time.perf_counter()
        if turn == 0:
            told = {"forward_s": middle - start, "backward_s": end - middle}
        else:
            _together(device)
            end = time.perf_counter()
        engine.step()
        synchronize(device)
        told["update_s"] = time.perf_counter() - end
    return told


def _sizes(engine: Any) -> dict[str, float]:
    """What a step of an engine at stage 0 reads and writes."""
    params = [p for p in engine.module.parameters() if p.requires_grad]
    numel, itemsize = sum(p.numel() for p in params), max(p.element_size() for p in params)
    states = _state_bytes(engine.optimizer)
    return {
        "numel": sum(p.numel() for p in engine.module.parameters()),
        "itemsize": itemsize,
        "units": len(choose_units(engine.module)),
        "update_bytes": update_bytes(numel, states, itemsize),
    }


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of an optimizer's states, without numbers such as a step."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.ndim)


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
    states = _state_bytes(optimizer)
    ds_zero.destroy(model)
    itemsize = (dtype or torch.float32).itemsize
    return update_bytes(_UPDATE_NUMEL, states, itemsize) / statistics.median(seconds[1:])


def _alone() -> dist.ProcessGroup | None:
    """A group of this rank only; None if there are no others. Collective."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    return dist.new_subgroups(group_size=1)[0] if several else None


def _together(device: torch.device) -> None:
    """Ranks measure at the same time, since they share memory and cores."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    synchronize(device)
