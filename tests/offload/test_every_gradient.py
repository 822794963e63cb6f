"""Several backwards before a step, whose number the user decides: no gradient is lost, wherever gradients are kept."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import ds_zero
from contracts.distant_store import DistantStore
from ds_offload import CPUAdam, HostStore
from harness import ranks
from harness.covering import covering
from zero.models import Tiny, batch
from zero.parity import everywhere

SMALL = {"reduce_bucket_numel": 700, "persistence_threshold_numel": 20}
BACKWARDS = (3, 1, 4, 2)
"""Number of backwards before each step: it is never that of the step before."""
FACTORS: dict[str, list[Any]] = {
    "stage": [0, 1, 2, 3],
    "plan": ["local", "sharded"],
    "place": ["host", "disk"],
    "early": [False, True],
    "tells": ["nothing", "no_sync", "set_requires_gradient_sync"],
}


def gradients(row: dict[str, Any], rank: int) -> list[dict[str, torch.Tensor]]:
    """The whole gradients before each step."""
    torch.manual_seed(0)
    model = Tiny(layers=2)
    optimizer = CPUAdam(model.parameters(), lr=1e-2)
    store: Any = (
        HostStore(("master", "grad", "param")) if row["place"] == "host" else DistantStore(in_thread=True)
    )
    config = ds_zero.ZeroConfig(
        param_dtype=torch.bfloat16, accumulation=row["plan"], overlap_step=row["early"], **SMALL
    )
    ds_zero.shard(model, optimizer, row["stage"], config=config, store=store)
    found, number = [], 0
    for count in BACKWARDS:
        for index in range(count):
            last = index == count - 1
            if row["tells"] == "set_requires_gradient_sync":
                ds_zero.control(model).set_requires_gradient_sync(last)
            loss = model(*batch(number, rank))
            number += 1
            if row["tells"] == "no_sync" and not last:
                with ds_zero.no_sync(model):
                    loss.backward()
            else:
                loss.backward()
        of_step = {}
        for name, _ in model.named_parameters():
            value = ds_zero.get_full(model, name, "grad")
            assert value is not None
            of_step[name] = value
        found.append(of_step)
        optimizer.step()
        optimizer.zero_grad()
    found.append(everywhere(ds_zero.full_state_dict(model)))
    ds_zero.destroy(model)
    return found


def check(row: dict[str, Any], rank: int) -> None:
    """Compares with stage 0 in memory, whose gradients are whole on every rank; the plan decides the last bits."""
    # Backwards that are not reduced are added on each rank, as by the local plan.
    plan = row["plan"] if row["tells"] == "nothing" else "local"
    reference = {"stage": 0, "plan": plan, "place": "host", "early": False, "tells": row["tells"]}
    for step, (a, b) in enumerate(zip(gradients(row, rank), gradients(reference, rank), strict=True)):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert torch.equal(a[name], value), (row, step, name)


@ranks(2, timeout_s=300)
def test_no_gradient_is_lost() -> None:
    import torch.distributed as dist

    for row in covering(FACTORS):
        check(row, dist.get_rank())


@pytest.mark.full
@ranks(2, timeout_s=900)
def test_no_gradient_is_lost_whatever_is_combined() -> None:
    import torch.distributed as dist

    for values in itertools.product(*FACTORS.values()):
        check(dict(zip(FACTORS, values, strict=True)), dist.get_rank())
