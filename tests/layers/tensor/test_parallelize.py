"""Models whose layers are cut among ranks compute what they compute on one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

from ds_layers.tensor import (
    Cut,
    cut_of,
    joined,
    localize,
    parallelize,
    plan_of_specs,
    vocab_parallel_cross_entropy,
)
from harness import ranks

TOKENS = torch.randint(0, 31, (2, 8), generator=torch.Generator().manual_seed(1))


def hugging_face(kind: str, **more: Any) -> nn.Module:
    import transformers as hf

    torch.manual_seed(2)
    if kind == "gpt2":
        rates = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
        config: Any = hf.GPT2Config(
            vocab_size=31,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
            **rates,
        )
        return hf.GPT2LMHeadModel(config)  # type: ignore[no-any-return]
    if kind.startswith("t5"):
        config = hf.T5Config(
            vocab_size=31,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu" if kind == "t5-gated" else "relu",
            decoder_start_token_id=0,
            tie_word_embeddings=kind == "t5",
        )
        return hf.T5ForConditionalGeneration(config)  # type: ignore[no-any-return]
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        **more,
    }
    if kind == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes))  # type: ignore[no-any-return]
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))  # type: ignore[no-any-return]


def loss_of(model: Any) -> Tensor:
    loss: Tensor = model(input_ids=TOKENS, labels=TOKENS).loss
    return loss


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of whole tensors, from the parts of all ranks."""
    grads = {}
    for name, param in model.named_parameters():
        assert param.grad is not None
        cut = cut_of(name, param)
        if cut is None:
            grads[name] = param.grad
            continue
        shapes = [
            Cut(shape=cut.shape, dim=cut.dim, index=i, size=cut.size, blocks=cut.blocks)
            for i in range(cut.size)
        ]
        parts = [torch.empty(one.local_shape) for one in shapes]
        for source, part in enumerate(parts):  # parts may differ in size
            if source == dist.get_rank():
                part.copy_(param.grad)
            dist.broadcast(part, source)
        grads[name] = joined(parts, cut)
    return grads


@ranks(2)
def test_losses_and_gradients_are_those_of_one_rank() -> None:
    for kind, options in (
        ("llama", {}),
        ("llama", {"sequence_parallel": True}),
        ("llama tied", {}),
        ("qwen3", {}),
        ("qwen3", {"sequence_parallel": True}),
        ("gpt2", {}),
        ("gpt2", {"vocabulary": True}),
        ("gpt2", {"sequence_parallel": True}),
        ("t5", {}),
        ("t5-gated", {"vocabulary": True}),
    ):
        name, _, tied = kind.partition(" ")
        model = hugging_face(name, **({"tie_word_embeddings": True} if tied else {}))
        reference = copy.deepcopy(model)
        numel = sum(p.numel() for p in model.parameters())
        before = dict(model.named_parameters())
        if dist.get_rank() == 1:  # all ranks get the values of the first
            with torch.no_grad():
                for param in model.parameters():
                    param.mul_(2)
        parallelize(model, **options)  # type: ignore[arg-type]
        after = dict(model.named_parameters())
        assert before.keys() == after.keys() and all(before[n] is after[n] for n in after)
        assert sum(p.numel() for p in model.parameters()) < 0.8 * numel
        want, got = loss_of(reference), loss_of(model)
        want.backward()
        got.backward()
        torch.testing.assert_close(got, want, msg=f"{kind} {options}")
        expected = dict(reference.named_parameters())
        for param, grad in whole_gradients(model).items():
            torch.testing.assert_close(
                grad, expected[param].grad, atol=2e-6, rtol=1e-4, msg=f"{kind} {options} {param}"
            )
    refused()
    vocabulary()
    dtensors()


def refused() -> None:
    model = parallelize(hugging_face("llama"))
    with pytest.raises(ValueError, match="is cut already, and is not cut again"):
        parallelize(model)
    with pytest.raises(ValueError, match="2 tensor-parallel ranks do not divide num_key_value_heads 1"):
        parallelize(hugging_face("llama", num_key_value_heads=1))
    with pytest.raises(ValueError, match=r"no tensor-parallel plan for Linear: pass plan="):
        parallelize(nn.Linear(4, 4))
    two = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match="'1': LayerNorm cannot be cut so"):
        parallelize(two, plan={"0": "column", "1": "row"})
    with pytest.raises(ValueError, match="style 'diagonal' of '0' is not supported"):
        parallelize(two, plan={"0": "diagonal"})
    with pytest.raises(ValueError, match="no module of the model matches"):
        parallelize(two, plan={"7": "row"})
    with pytest.raises(ValueError, match=r"'0': dimension 0 of .* has 4 sections of 1.5"):
        parallelize(two, plan={"0": "column:4"})
    with pytest.raises(ValueError, match="no ModuleList of layers"):
        parallelize(two, plan={"0": "column", "2": "row"}, sequence_parallel=True)
    with pytest.raises(ValueError, match="7 tokens cannot be divided among 2 tensor-parallel ranks"):
        parallelize(hugging_face("llama"), sequence_parallel=True)(input_ids=TOKENS[:, :7])
    # Nothing was changed, and a given plan works.
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    chain = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    dist.broadcast(chain[0].weight.data, 0)
    plan = plan_of_specs(
        [
            {"patterns": [r"0\.weight"], "partition_type": "column"},
            {"patterns": [r"2\.weight"], "partition_type": "row"},
        ]
    )
    parallelize(chain, plan=plan)
    results = [torch.empty(3, 2, 4) for _ in range(2)]
    dist.all_gather(results, chain(x).detach())
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="partition_type 'odd' is unknown"):
        plan_of_specs([{"patterns": ["a"], "partition_type": "odd"}])


def vocabulary() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, 31, generator=generator).requires_grad_()
    labels = torch.randint(0, 31, (2, 5), generator=generator)
    labels[0, 1] = -100
    cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    begin, end = rank * 31 // 2, (rank + 1) * 31 // 2
    own = logits.detach()[..., begin:end].requires_grad_()
    loss = vocab_parallel_cross_entropy(own, labels, group, 31)
    loss.backward()
    torch.testing.assert_close(loss, cross_entropy(logits.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(own.grad, logits.grad[..., begin:end])
    with pytest.raises(ValueError, match="of 31 logits of each label"):
        vocab_parallel_cross_entropy(own[..., 1:], labels, group, 31)


def dtensors() -> None:
    """A model that Transformers has cut is taken as it comes."""
    from torch.distributed.tensor import DTensor, distribute_tensor
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    model, reference = hugging_face("llama", vocab_size=32), hugging_face("llama", vocab_size=32)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    modules = [
        (name, style)
        for pattern, style in model._tp_plan.items()  # type: ignore[union-attr, operator]
        for name in (pattern.replace("*", "0"), pattern.replace("*", "1"))
    ]
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply_tensor_parallelism(model, mesh, dict([(f"{n}.weight", s) for n, s in modules] + modules))
    for name, param in model.named_parameters():
        if isinstance(param, DTensor):
            whole = distribute_tensor(values[name], mesh, param.placements)
            param.to_local().data.copy_(whole.to_local())
    with pytest.raises(ValueError, match="has DTensor parameters: it is cut already"):
        parallelize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert localize(model, optimizer) is mesh or dist.get_world_size(mesh.get_group()) == 2
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    want, got = loss_of(reference), loss_of(model)
    want.backward()
    got.backward()
    torch.testing.assert_close(got, want)
    expected = dict(reference.named_parameters())
    for name, grad in whole_gradients(model).items():
        torch.testing.assert_close(grad, expected[name].grad, atol=2e-6, rtol=1e-4, msg=name)
    assert localize(reference) is None


def test_a_part_knows_its_ranges() -> None:
    for shape, dim, blocks, size in (
        ((6, 5), 0, 1, 2),
        ((6, 5), 1, 1, 2),
        ((4, 12), 1, 3, 2),
        ((7, 3), 0, 1, 3),
    ):
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        cuts = [Cut(shape=shape, dim=dim, blocks=blocks, index=i, size=size) for i in range(size)]
        parts = [cut.of(whole) for cut in cuts]
        assert torch.equal(joined(parts, cuts[0]), whole)
        for cut, part in zip(cuts, parts, strict=True):
            assert tuple(part.shape) == cut.local_shape
            flat = part.flatten()
            ranges = list(cut.ranges(1, flat.numel() - 2))
            assert torch.equal(torch.cat([whole.flatten()[a : a + n] for a, n in ranges]), flat[1:-1])
