"""Fine-tunes LoRA adapters of a Hugging Face language model at ZeRO stage 3, in a plain loop.

Stage 3 divides the frozen base model among the ranks, too, so that the base may be larger than one device.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model

import ds_comm
import ds_zero

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a folder or name for from_pretrained; default: a tiny random Llama that reads bytes"
    )
    parser.add_argument(
        "--text", type=Path, default=Path(__file__), help="the file to learn (default: this script)"
    )
    parser.add_argument("--out", type=Path, default=Path("adapters"), help="where the adapters are saved")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=4, help="samples a rank and step")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--recompute", action="store_true", help="recompute activations in backward")
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[transformers.PreTrainedModel, torch.Tensor]:
    """The base model and the tokens of the text; the same on every rank."""
    if args.model is None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=256, max_position_embeddings=args.length, **TINY)
        return transformers.LlamaForCausalLM(config), torch.tensor(list(args.text.read_bytes()))
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    return model, torch.tensor(tokenizer(args.text.read_text())["input_ids"])


def save_adapters(model: torch.nn.Module, folder: Path, rank: int) -> None:
    """All ranks gather the trained parameters one by one; rank 0 writes them in PEFT's format."""
    values = {n: ds_zero.get_full(model, n) for n, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        model.save_pretrained(folder, state_dict=values)


def main() -> None:
    """Trains and saves; every rank runs it."""
    args = arguments()
    world = ds_comm.start()
    base, tokens = load(args)
    if args.recompute:  # each block keeps its input alone, and computes the rest again in backward
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(
        base, LoraConfig(r=args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr)
    model, optimizer = ds_zero.shard(model.to(world.device), optimizer, stage=3)
    if world.rank == 0:
        print(
            f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters trained"
        )
        print(ds_zero.memory(model, optimizer))

    draw = torch.Generator().manual_seed(world.rank)  # every rank sees other samples
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(tokens) - args.length, (args.batch,), generator=draw)
        batch = torch.stack([tokens[i : i + args.length] for i in starts]).to(world.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        norm = ds_zero.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if world.rank == 0 and (step % 10 == 0 or step in (1, args.steps)):
            print(
                f"step {step}: loss {loss.item():.3f}, gradient norm {norm:.3f}, {time.perf_counter() - began:.1f} s"
            )
    save_adapters(model, args.out, world.rank)
    ds_zero.destroy(model)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
