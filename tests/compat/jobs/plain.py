"""A training script as it is written for DeepSpeed: the optimizer by name, a schedule, accumulation, clipping."""

from __future__ import annotations

import argparse
import json

import common
import torch

import deepspeed

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--model", default="gpt2")
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--out", required=True)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

deepspeed.init_distributed(dist_backend="gloo")
rank, ranks = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
model = common.model(args.model)
config = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": args.accumulation,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 5}},
    "gradient_clipping": 1.0,
    "zero_optimization": common.zero(args.stage),
    "steps_per_print": 1000,
}
if args.bf16:
    config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
engine, _, _, schedule = deepspeed.initialize(
    args=args, model=model, model_parameters=model.parameters(), config=config
)
data = common.samples(2 * ranks * args.accumulation * args.steps)
losses = []
for micro_step in range(args.steps * args.accumulation):
    first = 2 * (micro_step * ranks + rank)
    batch = {key: torch.stack([sample[key] for sample in data[first : first + 2]]) for key in data[0]}
    loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if rank == 0:
    with open(args.out, "w") as file:
        json.dump(
            {"losses": losses, "lr": engine.get_lr()[0], "norm": float(engine.get_global_grad_norm() or 0)},
            file,
        )
engine.destroy()
torch.distributed.destroy_process_group()
