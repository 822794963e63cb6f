"""`initialize` with a `PipelineModule`: the training of one process, with every ZeRO stage inside."""

from __future__ import annotations

import itertools

import pytest
import torch

import ds_engine
import ds_zero
from harness import ranks
from pipe.model.test_pipeline import items, module, trained_alone

STEPS, COUNT = 6, 4


def config(stage: int, clip: float | None = None, **more):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": COUNT,
        "gradient_clipping": clip or 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "startup_summary": False,
        "steps_per_print": 0,
        **more,
    }


def started(num_stages: int, settings, *, tied=False, **options):
    built = module(num_stages, tied, **options)
    engine, *_ = ds_engine.initialize(built, settings)
    return engine


def data(engine, step: int, count: int = COUNT):
    return items(step, engine.topology.data.index, count)


def trained(engine, steps: int = STEPS, first: int = 0):
    return [engine.train_batch(data(engine, step)).item() for step in range(first, first + steps)]


def weights_of(engine):
    """Whole values of this rank's parameters."""
    with ds_zero.gathered(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def is_equal(engine, losses, data_ranks: int, *, tied=False, clip=None, steps=STEPS):
    expected, weights = trained_alone(steps, COUNT, data_ranks, tied, clip)
    assert losses == pytest.approx(expected, rel=1e-5)
    renamed = {"tied_modules.embedding.weight": "0.weight"}
    for name, value in weights_of(engine).items():
        torch.testing.assert_close(value, weights[renamed.get(name, name)], rtol=1e-4, atol=1e-6)


# (pipeline ranks, ZeRO stage, schedule, tied, clip, recompute)
THIN = [
    (2, 0, "1f1b", True, 0.5, 0),
    (2, 1, "zb-v", True, 0.5, 0),
    (2, 2, "1f1b", True, None, 1),
    (2, 3, "1f1b", True, 0.5, 0),
    (4, 3, "interleaved", False, None, 0),
    (4, 1, "zb-h1", True, 0.5, 0),
]
FULL = itertools.product(
    (2, 4),
    (0, 1, 2, 3),
    ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipev"),
    (False, True),
    (None, 0.5),
    (0, 1),
)


def compare(cases):
    for stages, stage, schedule, tied, clip, recompute in cases:
        if schedule == "dualpipev" and stages * 2 > COUNT:
            continue
        engine = started(
            stages,
            config(stage, clip),
            tied=tied,
            schedule=schedule,
            activation_checkpoint_interval=recompute,
        )
        losses = trained(engine)
        try:
            is_equal(engine, losses, 4 // stages, tied=tied, clip=clip)
        except AssertionError as error:
            raise AssertionError(f"{stages, stage, schedule, tied, clip, recompute}: {error}") from error
        assert (engine.global_steps, engine.micro_steps) == (STEPS, STEPS * COUNT)
        engine.destroy()


@ranks(4)
def test_losses_and_weights_are_those_of_one_process():
    compare(THIN)


@pytest.mark.full
@ranks(4, timeout_s=1200)
def test_every_combination():
    compare(FULL)
