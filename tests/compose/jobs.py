"""One small job on four ranks, made of the features that it is asked for, and the same training on one process."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import ds_engine
import ds_layers
import ds_moe
from ds_engine.config import ConfigError
from ds_pipe.model import LayerSpec, PipelineModule

WORLD = 4
STEPS = 2
WIDTH, VOCAB, TOKENS = 16, 31, 8

AXES: dict[str, tuple[str, ...]] = {
    "stage": ("ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"),
    "offload": ("states in host memory", "states on a disk", "parameters on a disk"),
    "pipe": ("pipeline",),
    "tensor": ("tensor parallel",),
    "sequence": ("sequence parallel",),
    "expert": ("expert parallel",),
    "optimizer": ("1-bit Adam",),
    "compile": ("torch.compile",),
    "checkpoint": ("checkpoint for other sizes",),
}
FEATURES = tuple(itertools.chain(*AXES.values()))
AXIS_OF = {feature: axis for axis, features in AXES.items() for feature in features}

Job = frozenset[str]


def pairs() -> Iterator[tuple[str, str]]:
    """All pairs of features of different axes, in the order of the table."""
    return ((a, b) for a, b in itertools.combinations(FEATURES, 2) if AXIS_OF[a] != AXIS_OF[b])


class Experts(nn.Module):
    """Experts in place of a feed-forward block: no token is dropped, so that ranks do not matter."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.moe = ds_moe.MoE(WIDTH, lambda: ds_moe.FeedForward(WIDTH, 32), 4, ep_size, drop_tokens=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x)[0]
        return out


class Block(nn.Module):
    def __init__(self, ep_size: int) -> None:
        super().__init__()
        plain = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH))
        self.inner = Experts(ep_size) if ep_size else plain

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def language_model(ep_size: int) -> nn.Module:
    """A decoder of Transformers; `ep_size` 0: without experts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    if ep_size:
        model.model.layers[1].mlp = Experts(ep_size)  # type: ignore[union-attr]
    return model


def layers(ep_size: int) -> list[LayerSpec]:
    body = [LayerSpec(Block, ep_size if i % 2 else 0) for i in range(4)]
    return [LayerSpec(nn.Embedding, VOCAB, WIDTH), *body, LayerSpec(nn.Linear, WIDTH, VOCAB)]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tokens_of(step: int, samples: Iterable[int]) -> Tensor:
    return torch.stack(
        [
            torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(10 * step + s))
            for s in samples
        ]
    )


def expected(job: Job, steps: int) -> list[float]:
    """The losses of one process in plain torch, the mean over four samples in each step."""
    ep_size = 1 if "expert parallel" in job else 0
    piped = "pipeline" in job
    if piped:
        made = []
        for i, spec in enumerate(layers(ep_size)):
            torch.manual_seed(1234 + i)
            made.append(spec.build())
        model: nn.Module = nn.Sequential(*made)
    else:
        model = language_model(ep_size)
    params = list(model.parameters())
    optimizer = torch.optim.Adam(params, lr=0.01) if "1-bit Adam" in job else torch.optim.SGD(params, lr=0.5)
    losses = []
    for step in range(steps):
        tokens = tokens_of(step, range(WORLD))
        loss = loss_of(model(tokens), tokens) if piped else model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def config_of(job: Job, folder: Path) -> dict[str, Any]:
    by_axis = {AXIS_OF[feature]: feature for feature in job}
    offload = by_axis.get("offload")
    stage = 3 if offload == "parameters on a disk" else 0 if "1-bit Adam" in job else 1
    zero: dict[str, Any] = {"stage": int(by_axis["stage"][-1]) if "stage" in by_axis else stage}
    if offload == "states in host memory":
        zero["offload_optimizer"] = {"device": "cpu"}
    elif offload == "states on a disk":
        zero["offload_optimizer"] = {"device": "nvme", "nvme_path": str(folder)}
    elif offload is not None:
        zero["offload_param"] = {"device": "nvme", "nvme_path": str(folder)}
    one_bit = {"type": "OneBitAdam", "params": {"lr": 0.01, "freeze_step": 100}}
    config: dict[str, Any] = {
        "train_batch_size": WORLD,
        "gradient_accumulation_steps": 1,
        # SGD, since Adam's steps do not depend on the scale of gradients; for the same reason nothing is clipped.
        "optimizer": one_bit if "1-bit Adam" in job else {"type": "SGD", "params": {"lr": 0.5}},
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "startup_summary": False,
        "steps_per_print": 0,
    }
    if "tensor parallel" in job:
        config["tensor_parallel"] = {"autotp_size": 2}
        if "pipeline" in job:  # a list of layers of one's own has no plan
            specs = [
                {"patterns": [r"\d+\.inner\.0\.weight"], "partition_type": "column"},
                {"patterns": [r"\d+\.inner\.2\.weight"], "partition_type": "row"},
            ]
            own = {"use_default_specs": False, "layer_specs": specs}
            config["tensor_parallel"]["partition_config"] = own
    if "sequence parallel" in job:
        config["sequence_parallel_size"] = 2
    return config


def started(job: Job, folder: Path, num_stages: int = 2, ep_size: int = 2) -> ds_engine.Engine:
    ep_size = ep_size if "expert parallel" in job else 0
    model: nn.Module
    if "pipeline" in job:
        model = PipelineModule(layers(ep_size), num_stages, loss_fn=loss_of, seed_layers=True)
    else:
        model = language_model(ep_size)
    if "torch.compile" in job:
        model.compile(backend="eager")
    engine: ds_engine.Engine = ds_engine.initialize(model, config_of(job, folder))[0]
    if "sequence parallel" in job:
        parallel = ds_layers.SequenceParallelAttention(engine.roles.sequence_group)
        ds_layers.register_with_transformers(parallel, model=model)
    return engine


def losses_of(engine: ds_engine.Engine, job: Job, first: int, last: int) -> list[float]:
    """The mean loss over all samples, step by step, on every rank."""
    losses = []
    data = engine.topology.samples
    samples = range(data.index * WORLD // data.size, (data.index + 1) * WORLD // data.size)
    for step in range(first, last):
        tokens = tokens_of(step, samples)
        if "pipeline" in job:
            losses.append(engine.train_batch(iter([(tokens, tokens)])).item())  # type: ignore[attr-defined]
            continue
        if "sequence parallel" in job:
            group = engine.roles.sequence_group
            (part,) = ds_layers.SequenceBatches([{"input_ids": tokens, "labels": tokens}], group, shared=True)
            labels = part.pop("shift_labels")
            loss = ds_layers.sequence_parallel_cross_entropy(engine(**part).logits, labels, group)
        else:
            loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / WORLD)
    return losses


def outcome(job: Job, folder: Path) -> str:
    """Trains; returns "" if the losses are those of one process, else why the job was refused, or the warning that a
    feature has no effect. Collective.

    Raises:
        AssertionError: other losses.
    """
    try:
        engine = started(job, folder)
    except (ConfigError, UserWarning) as error:  # warnings are errors in tests
        return str(error).removeprefix("config: ").removeprefix("the configuration: ")
    with warnings.catch_warnings():
        if "torch.compile" in job:  # torch warns of every call that it cannot trace
            warnings.simplefilter("ignore")
        return _trained(engine, job, folder)


def _trained(engine: ds_engine.Engine, job: Job, folder: Path) -> str:
    got = losses_of(engine, job, 0, STEPS)
    want = expected(job, STEPS + 1)
    if "checkpoint for other sizes" in job:
        engine.save_checkpoint(str(folder / "saved"))
    engine.destroy()
    if "checkpoint for other sizes" in job:
        # Without the division, and experts on other ranks; pipelines have layers of their own.
        kept = job - {"tensor parallel", "sequence parallel"}
        # Four stages leave one rank for the experts of each.
        resumed = started(kept, folder, num_stages=4, ep_size=1 if "pipeline" in job else 4)
        resumed.load_checkpoint(str(folder / "saved"))
        got += losses_of(resumed, kept, STEPS, STEPS + 1)
        resumed.destroy()
    for step, loss in enumerate(got):
        assert abs(loss - want[step]) <= 1e-4 * want[step], (
            f"step {step} of {sorted(job)}: {loss}, {want[step]}"
        )
    return ""
