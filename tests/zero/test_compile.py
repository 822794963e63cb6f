"""torch.compile of a sharded model: hooks stay outside of graphs, and training stays what it was."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from harness import ranks
from zero.models import Tiny, batch

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # by the compiler

HOWS = ("before", "after", "method", "blocks")


def train(stage: int, how: str, backend: str, *, tied: bool = False) -> list[float]:
    """Losses of training steps with an evaluation in between; "" compiles nothing."""
    torch.manual_seed(0)
    model = Tiny(layers=2, tied=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    called: nn.Module = model
    if how == "before":
        called = torch.compile(model, backend=backend)  # type: ignore[assignment]
    if how == "blocks":
        for block in model.blocks:
            block.compile(backend=backend)
    ds_zero.shard(model, optimizer, stage, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))
    if how == "after":
        called = torch.compile(model, backend=backend)  # type: ignore[assignment]
    if how == "method":
        model.compile(backend=backend)
    losses = []
    rank = dist.get_rank()
    for step in range(3):
        loss = called(*batch(step, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step:
            with torch.no_grad():
                losses.append(called(*batch(9, rank)).item())
    assert ds_zero.memory(model, optimizer).gathered_bytes == 0
    return losses


@ranks(2, timeout_s=240)
@pytest.mark.parametrize(
    "stage, how, backend",
    [
        (3, "after", "eager"),
        (3, "blocks", "aot_eager"),
        (2, "before", "eager"),
        *(
            pytest.param(stage, how, backend, marks=pytest.mark.full)
            for stage in (0, 1, 2, 3)
            for how in HOWS
            for backend in ("eager", "aot_eager", "inductor")
        ),
    ],
)
def test_compiled_is_uncompiled(stage: int, how: str, backend: str) -> None:
    """Bitwise with backends that run torch's own kernels, to rounding with generated ones."""
    tqdm = pytest.importorskip("tqdm", reason="tqdm is not installed")
    tqdm.tqdm.monitor_interval = 0  # the compiler's progress bars start a thread otherwise
    torch._dynamo.reset()
    expected = train(stage, "", backend)
    found = train(stage, how, backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    if backend == "inductor":
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        assert found == expected


@ranks(2, timeout_s=240)
@pytest.mark.full
@pytest.mark.parametrize("how", HOWS)
def test_a_tied_head(how: str) -> None:
    torch._dynamo.reset()
    assert train(3, how, "eager", tied=True) == train(3, "", "eager", tied=True)


@ranks(1)
def test_importing_and_training_imports_no_compiler() -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch, ds_zero\n"
        "m = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))\n"
        "o = torch.optim.SGD(m.parameters(), lr=0.1, foreach=False)\n"
        "ds_zero.shard(m, o, 3, config=ds_zero.ZeroConfig(persistence_threshold_numel=0))\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "m(torch.ones(1, 4)).sum().backward()\n"
        "assert before or 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
