"""`split`: ordinary modules and Hugging Face decoders as pipelines."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_pipe.model import Pipeline, PipelineModule, split
from harness import ranks


def decoder(kind: str, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **{"head_dim": 4} if kind in ("Qwen3", "Gemma") else {},
        **options,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def loss_fn(logits, labels):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def trained(model, steps, batches):
    """Losses of the unchanged model in one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        total = 0.0
        for tokens in batches:
            loss = loss_fn(model(tokens).logits, tokens) / len(batches)
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@ranks(2)
@pytest.mark.parametrize(
    "kind, tied",
    [
        ("Llama", False),
        ("Qwen2", True),
        *(
            pytest.param(k, t, marks=pytest.mark.full)
            for k in ("Llama", "Mistral", "Qwen3", "Gemma")
            for t in (True, False)
        ),
    ],
)
def test_a_hugging_face_decoder_trains_as_a_pipeline(kind, tied):
    options = {"tie_word_embeddings": tied}
    if kind == "Mistral":
        options["sliding_window"] = None
    module = PipelineModule(split(decoder(kind, **options)), 2, loss_fn=loss_fn, partition_method="uniform")
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 50, (2, 12), generator=generator) for _ in range(4)]
    pipeline = Pipeline(module, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        losses.append(pipeline.forward_backward((t, t) for t in batches).item())
        optimizer.step()
        optimizer.zero_grad()
    pipeline.close()
    assert losses == pytest.approx(trained(decoder(kind, **options), 5, batches), rel=1e-5)
    assert losses[-1] < losses[0]
    assert dist.get_world_size() == 2


def test_a_sequential_is_flattened():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(inner, nn.Tanh()))
    layers = split(model)
    assert [type(layer).__name__ for layer in layers] == ["Linear", "Linear", "ReLU", "Tanh"]
    x = torch.randn(3, 2)
    assert torch.equal(PipelineModule(layers, 1)(x), model(x))


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("Mistral", {"sliding_window": 8}, "its logits differ"),
        ("Llama", {"attn_implementation": "eager"}, "use 'sdpa'"),
    ],
)
def test_a_model_that_works_in_another_way_is_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        split(decoder(kind, **options))


def test_a_module_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear is neither an"):
        split(nn.Linear(2, 2))


def test_learned_positions_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=128)
    with pytest.raises(ValueError, match="GPT2LMHeadModel computes something between its blocks"):
        split(transformers.GPT2LMHeadModel(config))


@ranks(2)
def test_the_layers_of_other_ranks_are_not_kept():
    layers = [nn.Linear(2, 2) for _ in range(4)]
    dropped = weakref.ref(layers[3 if dist.get_rank() == 0 else 0])
    module = PipelineModule(layers, 2)
    del layers
    gc.collect()
    assert dropped() is None and len(list(module.parameters())) == 4
