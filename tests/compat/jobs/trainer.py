"""Fine-tuning with Transformers' Trainer: `TrainingArguments(deepspeed=...)`, "auto" values, saving, resuming."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import common
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="gpt2")
parser.add_argument("--stage", type=int, default=2)
parser.add_argument("--accumulation", type=int, default=1)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--out", required=True)
parser.add_argument("--optimizer", choices=("config", "trainer"), default="config")
parser.add_argument("--save-at", type=int, default=0)
parser.add_argument("--resume", help="a checkpoint of the Trainer's to go on from")
parser.add_argument("--pretrained", help="a folder to load the model from, under ZeRO-3")
args = parser.parse_args()

from accelerate import PartialState  # noqa: E402

# The backend by name: without a GPU Accelerate counts one process otherwise.
os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
PartialState(backend="gloo")
del os.environ["ACCELERATE_USE_DEEPSPEED"]
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

config = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": common.zero(args.stage) | {"reduce_bucket_size": "auto"},
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
}
if args.bf16:
    config["data_types"] = {"grad_accum_dtype": "fp32"}
if args.optimizer == "config":
    values = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    config["optimizer"] = {"type": "AdamW", "params": values}
    values = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
    config["scheduler"] = {"type": "WarmupLR", "params": values}
folder = Path(args.out).with_suffix("")
arguments = TrainingArguments(
    output_dir=str(folder),
    per_device_train_batch_size=2,
    per_device_eval_batch_size=2,
    gradient_accumulation_steps=args.accumulation,
    max_steps=args.steps,
    learning_rate=1e-3,
    warmup_steps=5,
    logging_steps=1,
    save_strategy="steps" if args.save_at else "no",
    save_steps=args.save_at or 500,
    bf16=args.bf16,
    report_to=[],
    disable_tqdm=True,
    dataloader_drop_last=True,
    accelerator_config={"use_configured_state": True},
    deepspeed=config,
)
losses: dict[int, float] = {}
norms: dict[int, float] = {}
micro_losses: list[float] = []


class Listen(TrainerCallback):
    """Keeps what is logged."""

    def on_log(self, arguments, state, control, logs=None, **_):
        if "loss" in logs:
            losses[state.global_step] = float(logs["loss"])
            norms[state.global_step] = float(logs.get("grad_norm") or 0)


class Exact(Trainer):
    """Keeps the losses of all micro-batches: the log has four digits."""

    def compute_loss(self, model, *inputs, **kwargs):
        found = super().compute_loss(model, *inputs, **kwargs)
        if model.training:
            micro_losses.append((found[0] if isinstance(found, tuple) else found).item())
        return found


model = AutoModelForCausalLM.from_pretrained(args.pretrained) if args.pretrained else common.model(args.model)
data = common.samples(256)
trainer = Exact(model=model, args=arguments, train_dataset=data, eval_dataset=data[:8], callbacks=[Listen()])
trainer.train(resume_from_checkpoint=args.resume)
evaluated = trainer.evaluate()["eval_loss"]
if arguments.process_index == 0:
    with open(args.out, "w") as file:
        json.dump(
            {
                "losses": list(losses.values()),
                "norms": list(norms.values()),
                "micro_losses": micro_losses,
                "eval": float(evaluated),
            },
            file,
        )
torch.distributed.barrier()
torch.distributed.destroy_process_group()
