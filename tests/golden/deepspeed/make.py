"""Writes one of the checkpoints here with DeepSpeed 0.19.8. See README.md for the commands.

torchrun --nproc-per-node RANKS make.py NAME STAGE fp32|bf16 NUM_GROUPS ['{"round_robin_gradients": true}']
"""

import json
import sys
from pathlib import Path

import job
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

import deepspeed


def main(name: str, stage: int, precision: str, num_groups: int, zero: dict[str, object]) -> None:
    deepspeed.init_distributed("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    net = job.model()
    engine, *_ = deepspeed.initialize(
        model=net,
        model_parameters=job.groups(net, num_groups),
        config=job.config(stage, precision, ranks, **zero),
    )

    def train(first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            loss = engine(*job.batch(step, rank, ranks))
            engine.backward(loss)
            engine.step()
            mean = loss.detach().float().clone()
            dist.all_reduce(mean)
            losses.append(mean.item() / ranks)
        return losses

    before = train(0, job.STEPS_BEFORE)
    folder = Path(__file__).parent / name
    engine.save_checkpoint(str(folder), client_state={"epoch": 3, "note": "hello"})
    expected = {}
    if stage > 0:
        for fqn, param in net.named_parameters():
            if param.requires_grad:
                expected[f"{fqn}/param"] = safe_get_full_fp32_param(param)
                # At stages 1 and 2 DeepSpeed raises where a rank has nothing of a parameter.
                for state in ("exp_avg", "exp_avg_sq") if stage == 3 else ():
                    expected[f"{fqn}/{state}"] = safe_get_full_optimizer_state(param, state)
    after = train(job.STEPS_BEFORE, job.STEPS_BEFORE + job.STEPS_AFTER)
    if rank == 0:
        for script in folder.glob("*.py"):
            script.unlink()
        facts = {"stage": stage, "precision": precision, "groups": num_groups, "ranks": ranks}
        facts |= {"before": before, "after": after}
        facts["expected"] = {key: value.flatten().tolist() for key, value in expected.items()}
        (folder / "facts.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(
        sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), json.loads((sys.argv[5:] or ["{}"])[0])
    )
