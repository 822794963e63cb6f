"""A training script as it is written for Accelerate, with its DeepSpeed plugin."""

from __future__ import annotations

import argparse
import json

import common
import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="gpt2")
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--out", required=True)
parser.add_argument("--state", help="a folder: save there in the middle, and load again")
args = parser.parse_args()

config = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": args.accumulation,
    "gradient_clipping": 1.0,
    "zero_optimization": common.zero(args.stage),
}
if args.bf16:
    config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
# The backend by name: without a GPU Accelerate counts one process otherwise.
accelerator = Accelerator(
    deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
    kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
)
model = common.model(args.model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
data = common.samples(2 * accelerator.num_processes * args.accumulation * args.steps)
loader = torch.utils.data.DataLoader(data, batch_size=2)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
losses = []
for number, batch in enumerate(loader):
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    losses.append(loss.item())
    if args.state and number + 1 == len(loader) // 2:
        accelerator.save_state(args.state)
        accelerator.load_state(args.state)
whole = accelerator.get_state_dict(model) if args.stage < 3 else None
if accelerator.is_main_process:
    with open(args.out, "w") as file:
        names = sorted(whole) if whole else []
        json.dump({"losses": losses, "lr": schedule.get_last_lr()[0], "names": names}, file)
accelerator.end_training()
