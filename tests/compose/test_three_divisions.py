"""Pipeline x tensor x expert parallelism on eight ranks: the losses of one process."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from compose.jobs import losses_of, outcome, started
from harness import ranks

DIVIDED = frozenset(("pipeline", "tensor parallel", "expert parallel"))


@ranks(8, groups_may_stay=True, timeout_s=240)
def test_experts_beside_cut_layers_in_stages(tmp_path: Path) -> None:
    for more in (("ZeRO 1",), ("ZeRO 3", "checkpoint for other sizes"), ("ZeRO 2", "states on a disk")):
        job = DIVIDED | set(more)
        folder = tmp_path / more[0]
        folder.mkdir(exist_ok=True)
        dist.barrier()
        assert outcome(job, folder) == ""


@ranks(8, groups_may_stay=True, timeout_s=120)
def test_each_rank_has_its_part_of_all_three(tmp_path: Path) -> None:
    engine = started(DIVIDED, tmp_path)
    assert engine.topology.sizes() == {"pipe": 2, "data": 2, "tensor": 2}
    held = {name: tuple(p.shape) for name, p in engine.module.named_parameters()}
    cut = [name for name in held if name.endswith("inner.0.weight")]
    experts = [name for name in held if ".experts." in name and name.endswith("up.weight")]
    assert cut and all(held[name] == (16, 16) for name in cut)
    assert experts and all(held[name] == (2, 32, 16) for name in experts)
    assert len(losses_of(engine, DIVIDED, 0, 1)) == 1
    engine.destroy()
