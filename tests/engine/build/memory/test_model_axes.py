"""`ds plan` of models that are divided themselves: predicted bytes of a rank beside those that its training
allocates.
"""

from __future__ import annotations

import json

import pytest
import torch.distributed as dist

from engine.build.memory.axis_jobs import AxisJob, count, experts, sequence, tensor
from engine.jobs import on_ranks

BF16 = {"bf16": {"enabled": True}}
JOBS = [tensor(1, 2), experts(2, 2), tensor(3, 4, **BF16), experts(3, 4)]
OTHERS = [
    tensor(0, 2),
    experts(1, 2, **BF16),
    sequence(0, 2),
    sequence(3, 2),
    sequence(1, 2, **BF16),
    tensor(2, 4),
    tensor(1, 4, **BF16),
    experts(0, 4),
    experts(2, 4, **BF16),
]


@pytest.fixture(autouse=True)
def _no_process_group():
    """Experts are planned in the place of a rank; tests that ran before may have left a group of one rank."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], job: AxisJob) -> None:
    on_ranks(request, job.ranks, count, groups_may_stay=True, job=job)
    line = next(line for line in capsys.readouterr().out.splitlines() if "COUNTED" in line)
    peak = json.loads(line.split("COUNTED ")[1])
    plan = job.plan()
    assert peak <= plan.device_bytes <= 1.03 * peak, (
        f"{plan.device_bytes / peak:.4f} of what was counted\n{plan}"
    )


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_the_plan_is_the_counted_peak(request, capsys, job):
    check(request, capsys, job)


@pytest.mark.full
@pytest.mark.parametrize("job", OTHERS, ids=str)
def test_the_plan_is_the_counted_peak_everywhere(request, capsys, job):
    check(request, capsys, job)
