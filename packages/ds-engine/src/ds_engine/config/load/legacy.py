"""Old and alternative names of keys, and keys of old configurations that never had an effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Rename:
    """An old or alternative name of a key."""

    old: str
    new: str
    value: Callable[[Any], Any] | None = None
    """Converts the value; None: unchanged. If it returns None, the key is dropped."""
    warn: bool = True
    """Whether to warn. False for an alternative name that is not deprecated."""


def _device(value: Any) -> Any:
    """Converts true and false of `cpu_offload` to the device. Other values are left to the check of types."""
    return {True: "cpu", False: "none"}[value] if isinstance(value, bool) else value


ZERO = "zero_optimization"
SCHEMA = "$schema"
"""Key with the address of the JSON schema, for editors; not a setting."""
STAGE3 = (
    "prefetch_bucket_size",
    "param_persistence_threshold",
    "model_persistence_threshold",
    "max_live_parameters",
    "max_reuse_distance",
    "gather_16bit_weights_on_model_save",
    "module_granularity_threshold",
    "use_all_reduce_for_fetch_params",
    "allgather_sequential",
)

RENAMES: tuple[Rename, ...] = (
    Rename(old="bfloat16", new="bf16"),
    Rename(old="train_micro_batch_size", new="train_micro_batch_size_per_gpu"),
    Rename(old="allgather_size", new=f"{ZERO}.allgather_bucket_size"),
    Rename(
        old="fp32_allreduce",
        new="communication_data_type",
        value=lambda on: {True: "fp32", False: None}.get(on, on),
    ),
    Rename(old=f"{ZERO}.cpu_offload", new=f"{ZERO}.offload_optimizer.device", value=_device),
    Rename(old=f"{ZERO}.cpu_offload_param", new=f"{ZERO}.offload_param.device", value=_device),
    Rename(old=f"{ZERO}.cpu_offload_params", new=f"{ZERO}.offload_param.device", value=_device),
    Rename(old=f"{ZERO}.cpu_offload_use_pin_memory", new=f"{ZERO}.offload_optimizer.pin_memory"),
    Rename(
        old=f"{ZERO}.stage3_gather_fp16_weights_on_model_save",
        new=f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
    ),
    Rename(old="tensor_parallel.tensor_parallel", new="tensor_parallel.tp", warn=False),
    Rename(old="tensor_parallel.kernel_inject", new="tensor_parallel.replace_with_kernel_inject", warn=False),
    Rename(old="autotuning.start_step", new="autotuning.start_profile_step"),
    Rename(old="autotuning.end_step", new="autotuning.end_profile_step"),
    *(Rename(old=f"{ZERO}.{name}", new=f"{ZERO}.stage3_{name}", warn=False) for name in STAGE3),
)

EXTRAS: Mapping[str, str] = {
    "aio.thread_count": "an old name that DeepSpeed's own reader ignores; aio.intra_op_parallelism is the number of "
    "threads",
    "activation_checkpointing.partitioned_activations": "the name in DeepSpeed's old example; the key is "
    "partition_activations",
    "bf16.check_overflow": "the name in DeepSpeed's old example; the key is check_grad_overflow",
    "bf16.auto_cast": "bf16 always casts floating-point inputs",
    "fp16.opt_level": "an argument of Apex, which fp16 does not use",
    "fp16.type": "fp16 has only one type",
    "zero_optimization.load_from_fp32_weight": "a misspelling in old examples of load_from_fp32_weights",
    "zero_optimization.offload_optimizer.buffer_size": "only offload_param has it",
    "zero_optimization.offload_optimizer.max_in_cpu": "only offload_param has it",
    "zero_optimization.offload_param.pipeline_read": "only offload_optimizer has it",
    "zero_optimization.offload_param.pipeline_write": "only offload_optimizer has it",
    "pipeline.activation_checkpoint_func": "a file cannot contain a function; pass it to the model",
    "compile.disable": "a switch of older versions of DeepSpeed; the model is compiled where the script calls "
    "torch.compile",
    "compile.backend": "a setting of older versions of DeepSpeed; torch.compile(model, backend=...) has it",
    "compile.kwargs": "a setting of older versions of DeepSpeed; torch.compile has these arguments",
    "monitor_config": "each monitor has its own section: tensorboard, csv_monitor, wandb, comet",
}
"""Keys that real configurations contain although they have no effect in DeepSpeed: a warning, not an error."""


@dataclass(frozen=True, kw_only=True)
class Modern:
    """A configuration with current names."""

    raw: dict[str, Any]
    renamed: dict[str, str] = field(default_factory=dict)
    """Path as written -> current path."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Path -> why it is ignored."""
    warnings: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Path and sentence for each setting that is given under two names."""


def modernise(raw: dict[str, Any]) -> Modern:
    """Maps old names to current ones, and removes keys that never had an effect."""
    done = Modern(raw={key: _copied(value) for key, value in raw.items() if key != SCHEMA})
    for name in ("optimizer", "scheduler"):
        section = done.raw.get(name)
        if isinstance(section, dict) and section.get("type", "") is None:
            done.raw[name] = None  # whatever its arguments are, there is nothing to give them to
    if isinstance(done.raw.get(ZERO), bool):
        stage = int(done.raw[ZERO])
        # null and false turn off any section, so only true is an old form.
        if stage:
            done.raw[ZERO] = {"stage": stage}
            done.renamed[ZERO] = f"{ZERO}.stage"
            done.warnings.append(f'"{ZERO}": true is an old form: write {{"stage": 1}}')
    for rule in RENAMES:
        _rename(rule, done)
    for path, why in EXTRAS.items():
        holder, name = _holder(done.raw, path)
        if holder is not None and name in holder:
            del holder[name]
            done.ignored[path] = why
            done.warnings.append(f'"{path}" is ignored: {why}')
    return done


def _rename(rule: Rename, done: Modern) -> None:
    holder, name = _holder(done.raw, rule.old)
    if holder is None or name not in holder:
        return
    value = holder.pop(name)
    value = rule.value(value) if rule.value is not None else value
    if rule.warn:
        done.warnings.append(f'"{rule.old}" is an old name: write "{rule.new}"')
    if value is None:
        return
    target, last = _holder(done.raw, rule.new, make=True)
    if target is None:
        return  # what stands in the section's place is no object, which is said later
    # An old name beside the new one is harmless as long as the values agree.
    if last in target and target[last] != value:
        done.problems.append(
            (rule.old, f'"{rule.old}" and "{rule.new}" are the same setting: remove the first')
        )
    target.setdefault(last, value)
    done.renamed[rule.old] = rule.new


def _copied(value: Any) -> Any:
    return {key: _copied(inner) for key, inner in value.items()} if isinstance(value, dict) else value


def _holder(raw: dict[str, Any], path: str, make: bool = False) -> tuple[dict[str, Any] | None, str]:
    """Returns the dict that contains the last key of the path, if it exists."""
    here: Any = raw
    *way, name = path.split(".")
    for part in way:
        if make and here.get(part) in (None, False):
            here[part] = {}
        here = here.get(part)
        if not isinstance(here, dict):
            return None, name
    return here, name
