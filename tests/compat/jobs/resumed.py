"""Goes on from a checkpoint of the job in tests/golden/deepspeed, on any number of processes.

    torchrun ... resumed.py CHECKPOINT OUT

The mean loss over all ranks of every step is written to OUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import deepspeed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "golden" / "deepspeed"))
import job

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
known = json.loads((folder / "facts.json").read_text())
deepspeed.init_distributed("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
net = job.model()
with torch.no_grad():
    for param in net.parameters():
        param.zero_()  # every value has to come from the checkpoint
engine, *_ = deepspeed.initialize(
    model=net,
    model_parameters=job.groups(net, known["groups"]),
    config=job.config(known["stage"], known["precision"], ranks),
)
path, client_state = engine.load_checkpoint(str(folder))
assert path is not None and client_state["epoch"] == 3 and engine.global_steps == job.STEPS_BEFORE
losses = []
for step in range(job.STEPS_BEFORE, job.STEPS_BEFORE + job.STEPS_AFTER):
    loss = engine(*job.batch(step, rank, ranks))
    engine.backward(loss)
    engine.step()
    mean = loss.detach().float().clone()
    dist.all_reduce(mean)
    losses.append(mean.item() / ranks)
if rank == 0:
    out.write_text(json.dumps(losses))
engine.destroy()
dist.barrier()
dist.destroy_process_group()
