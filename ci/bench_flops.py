"""FLOPs of whole models: ds_profiler beside DeepSpeed's profiler, and what profiling costs.

    ci/bench flops

Counts are exact and the same on every machine. The overhead is that of a recorded forward and backward
beside the same without a profiler, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings

import torch
import transformers
from torch import nn

BATCH, TOKENS = 2, 64


class ByOperator(nn.Module):
    """Attention as a reader of the paper writes it."""

    def forward(self, q):
        return (q @ q.transpose(-1, -2)).softmax(-1) @ q


class ByKeyword(nn.Module):
    def forward(self, q):
        return nn.functional.scaled_dot_product_attention(query=q, key=q, value=q)


def models():
    """(name, model, keyword arguments of its forward)."""
    ids = torch.arange(BATCH * TOKENS).view(BATCH, TOKENS)
    ends = {"vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2}
    for attention in ("eager", "sdpa"):
        gpt2 = transformers.GPT2Config(
            n_layer=4, n_embd=256, n_head=8, n_positions=TOKENS, attn_implementation=attention, **ends
        )
        yield f"GPT-2, {attention}", transformers.GPT2LMHeadModel(gpt2), {"input_ids": ids}
        llama = transformers.LlamaConfig(
            num_hidden_layers=4,
            hidden_size=256,
            intermediate_size=512,
            num_attention_heads=8,
            num_key_value_heads=2,
            attn_implementation=attention,
            **ends,
        )
        yield f"Llama, {attention}", transformers.LlamaForCausalLM(llama), {"input_ids": ids}
    t5 = transformers.T5Config(d_model=128, d_kv=16, d_ff=256, num_layers=2, num_heads=8, vocab_size=1000)
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :16]}
    yield "T5", transformers.T5ForConditionalGeneration(t5), given
    mixtral = transformers.MixtralConfig(
        num_hidden_layers=2,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        **ends,
    )
    yield "Mixtral, 2 of 8 experts", transformers.MixtralForCausalLM(mixtral), {"input_ids": ids}
    resnet = transformers.ResNetConfig(num_labels=1000)
    pixels = {"pixel_values": torch.randn(1, 3, 224, 224)}
    yield "ResNet-50 (published: 4.09 GMACs)", transformers.ResNetForImageClassification(resnet), pixels
    yield "attention with @", ByOperator(), {"q": torch.randn(2, 4, 64, 32)}
    yield "attention with keywords", ByKeyword(), {"q": torch.randn(2, 4, 64, 32)}


def counts(ours):
    """Name -> [FLOPs, MACs, parameters], or the error."""
    if ours:
        from ds_profiler import profile_model
    else:
        from deepspeed.profiling.flops_profiler import get_model_profile
    results = {}
    for name, model, kwargs in models():
        model.eval()
        try:
            if ours:
                profile = profile_model(model, kwargs=kwargs)
                results[name] = [profile.forward.flops, profile.forward.macs, profile.model.params]
            else:
                results[name] = list(
                    get_model_profile(model, kwargs=kwargs, print_profile=False, as_string=False)
                )
        except (TypeError, RuntimeError, ValueError) as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def overhead(rounds):
    """How much longer a forward and backward of Llama takes while it is recorded."""
    from ds_profiler import FlopsProfiler

    config = transformers.LlamaConfig(
        num_hidden_layers=4, hidden_size=512, intermediate_size=1408, num_attention_heads=8, vocab_size=4000
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(4000, (4, 256))
    profiler = FlopsProfiler(model)

    def seconds(recorded):
        start = time.perf_counter()
        if recorded:
            profiler.start()
        model(input_ids=ids, labels=ids).loss.backward()
        profiler.stop()
        return time.perf_counter() - start

    seconds(recorded=True)
    pairs = [(seconds(recorded=True), seconds(recorded=False)) for _ in range(rounds)]
    return statistics.median(a / b for a, b in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="Python of an environment with DeepSpeed and transformers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--overhead", action="store_true", help="only measure what recording a step costs")
    parser.add_argument("--counts-of", choices=["ours", "peer"], help="only print the counts, as JSON")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.counts_of:
        print("COUNTS" + json.dumps(counts(given.counts_of == "ours")))
        return
    if given.overhead:
        print(f"A step while it is recorded: {overhead(given.rounds):.3f} x the step without a profiler.")
        return
    ours, peers = counts(ours=True), {}
    if given.peer:
        command = [given.peer, __file__, "--counts-of", "peer"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peers = json.loads(next(line for line in said.splitlines() if line.startswith("COUNTS"))[6:])
    print("| model | MACs | FLOPs | MACs by DeepSpeed | FLOPs by DeepSpeed |\n|---|---|---|---|---|")
    for name, (flops, macs, _) in ours.items():
        peer = peers.get(name, "not measured")
        cells = (
            [peer[:60], ""]
            if isinstance(peer, str)
            else [f"{peer[1] / macs:.4f} x", f"{peer[0] / flops:.4f} x"]
        )
        print(f"| {name} | {macs} | {flops} | {' | '.join(cells)} |")
    print(f"\nA step while it is recorded: {overhead(given.rounds):.3f} x the step without a profiler.")


if __name__ == "__main__":
    sys.exit(main())
