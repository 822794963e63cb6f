"""Models that only answer, whole or divided among ranks: the same answers as plain PyTorch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_engine
import ds_zero
from ds_engine.config.sections.inference import IGNORED, InferenceConfig, read_inference
from harness import ranks

pytest.importorskip("transformers", reason="transformers is not installed")

STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
END = 63


def build(name: str = "gpt2") -> Any:
    import transformers as hf

    torch.manual_seed(0)
    if name == "t5":
        t5 = hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        t5.decoder_start_token_id = t5.pad_token_id = 0
        return hf.T5ForConditionalGeneration(t5)
    gpt2 = hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    gpt2.eos_token_id = gpt2.bos_token_id = END
    return hf.GPT2LMHeadModel(gpt2)


def prompt(rank: int) -> Tensor:
    """Of another length on every rank."""
    return torch.randint(1, 60, (2, 3 + rank), generator=torch.Generator().manual_seed(rank))


def options(rank: int) -> dict[str, Any]:
    """Another number of tokens on every rank."""
    return {"max_new_tokens": 2 + 5 * rank, "do_sample": False, "pad_token_id": 0}


def own_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@ranks(1, 2, timeout_s=120)
@pytest.mark.parametrize("name", ["gpt2", pytest.param("t5", marks=pytest.mark.full)])
def test_a_divided_model_answers_as_a_whole_one_whatever_the_lengths(name: str) -> None:
    rank = own_rank()
    reference, model = build(name).eval(), build(name)
    engine = ds_engine.init_inference(model, zero=STAGE_3)
    assert engine.sharded and not engine.training
    inputs = {"input_ids": prompt(rank)} | ({"decoder_input_ids": prompt(rank)} if name == "t5" else {})
    with torch.no_grad():
        assert torch.equal(engine(**inputs).logits, reference(**inputs).logits)
    found, expected = (m.generate(prompt(rank), **options(rank)) for m in (engine, reference))
    assert torch.equal(found, expected)
    assert not any(presence.here for p in model.parameters() if (presence := ds_zero.presence(p)))
    assert engine.config is model.config  # what it does not have is the module's
    engine.destroy()
    assert torch.equal(model.generate(prompt(rank), **options(rank)), expected)


@ranks(2, timeout_s=120)
def test_a_rank_holds_its_part_alone() -> None:
    model = build()
    whole = sum(p.numel() for p in model.parameters()) * 4
    with ds_zero.deferred_init(stage=3):
        waiting = build()
    engine = ds_engine.init_inference(waiting, {"dtype": "bf16"})
    own = [presence.own for p in waiting.parameters() if (presence := ds_zero.presence(p))]
    held = sum(part.numel() * part.element_size() for part in own if part is not None)
    assert 0.45 * whole / 2 < held < 0.6 * whole / 2  # 2 bytes instead of 4, and half of them
    expected = model.bfloat16().eval()(prompt(0)).logits
    assert torch.equal(engine(prompt(0)).logits, expected)
    assert not engine(prompt(0)).logits.requires_grad


@ranks(2, timeout_s=120)
def test_ranks_that_share_a_copy_and_ranks_that_do_not() -> None:
    rank, reference = own_rank(), build().eval()
    shared = ds_engine.init_inference(build(), tensor_parallel={"tp_size": 2})
    alone = ds_engine.init_inference(build())
    assert shared.sharded and not alone.sharded
    for engine in (shared, alone):
        expected = reference.generate(prompt(rank), **options(rank))
        assert torch.equal(engine.generate(prompt(rank), **options(rank)), expected)
    with pytest.raises(ds_engine.ConfigError, match="tp_size 3 does not divide 2 ranks"):
        ds_engine.init_inference(build(), tp={"tp_size": 3})
    if rank == 0:  # nobody else is needed
        alone(prompt(0))


@ranks(2, groups_may_stay=True, timeout_s=120)
def test_experts_on_different_ranks_answer_as_whole_ones() -> None:
    """Also beside ZeRO-3, and at different lengths: a rank that has finished goes on to serve the other's tokens."""
    from engine.build.test_expert_section import mixtral

    rank, reference = own_rank(), mixtral().eval()
    expected = reference.generate(prompt(rank) % 31, **options(rank))
    for given in ({"ep_size": 2}, {"moe": {"enabled": True, "ep_size": 2}, "zero": STAGE_3}):
        model = mixtral()
        engine = ds_engine.init_inference(model, given)
        experts = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj.shape[0] == 2 and engine.sharded == ("zero" in given)
        assert torch.equal(engine.generate(prompt(rank) % 31, **options(rank)), expected)
        engine.destroy()


@ranks(2, timeout_s=120)
def test_an_engine_that_trains_generates_at_different_lengths() -> None:
    rank, reference, model = own_rank(), build(), build()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": STAGE_3,
        "startup_summary": False,
    }
    engine, *_ = ds_engine.initialize(model=model, config=config)
    with engine:
        engine.eval()
        found = engine.generate(prompt(rank), **options(rank))
        assert torch.equal(found, reference.eval().generate(prompt(rank), **options(rank)))
        engine.train()
        engine.backward(engine(input_ids=prompt(rank), labels=prompt(rank)).loss)
        engine.step()
    with pytest.raises(AttributeError, match="generate"):
        ds_engine.Engine.__getattr__(type("E", (), {"module": nn.Linear(1, 1)})(), "generate")  # type: ignore[arg-type]


def stored_safetensors(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def stored_torch(model: Any, folder: Path) -> Any:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def stored_list(model: Any, folder: Path) -> Any:
    values = list(model.state_dict().items())
    for number, part in enumerate((values[:5], values[5:])):
        torch.save(dict(part), folder / f"part{number}.pt")
    (folder / "list.json").write_text(
        json.dumps({"type": "ds_model", "checkpoints": ["part0.pt", "part1.pt"]})
    )
    return folder / "list.json"


def stored_dict(model: Any, folder: Path) -> Any:
    stored_list(model, folder)
    return {"checkpoints": ["part0.pt", "part1.pt"], "base_dir": str(folder)}


def stored_by_an_engine(model: Any, folder: Path) -> Any:
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD"}, "startup_summary": False}
    engine, *_ = ds_engine.initialize(model=model, config=config)
    with engine:
        engine.save_checkpoint(folder)
    return folder


WAYS: list[Callable[[Any, Path], Any]] = [
    stored_safetensors, stored_torch, stored_list, stored_dict, stored_by_an_engine,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.removeprefix("stored_"))
@pytest.mark.parametrize("deferred", [False, True], ids=["ordinary", "deferred"])
def test_stored_weights_are_read(way: Callable[[Any, Path], Any], deferred: bool, tmp_path: Path) -> None:
    reference = build()
    with torch.no_grad():
        for param in reference.parameters():
            param.add_(0.25)  # so that they cannot be those of construction
    with ds_zero.deferred_init(stage=3) if deferred else torch.no_grad():
        model = build()
    where = way(reference, tmp_path)
    engine = ds_engine.init_inference(model, checkpoint=str(where) if isinstance(where, Path) else where)
    assert engine.sharded == deferred
    assert torch.equal(engine(prompt(0)).logits, reference.eval()(prompt(0)).logits)


@ranks(2, timeout_s=120)
def test_every_rank_gets_what_rank_0_reads() -> None:
    with tempfile.TemporaryDirectory() as folder:
        reference = build()
        with torch.no_grad():
            reference.lm_head.weight.mul_(3)
        stored_torch(reference, Path(folder))
        with ds_zero.deferred_init(stage=3):
            model = build()
        engine = ds_engine.init_inference(model, checkpoint=folder)
        assert torch.equal(engine(prompt(0)).logits, reference.eval()(prompt(0)).logits)
        values = reference.state_dict()
        values.pop("transformer.h.0.attn.c_attn.weight")
        torch.save(values, Path(folder, "less.bin"))
        with pytest.raises(
            ds_engine.CheckpointError, match=r"27 of 28 tensors .* transformer.h.0.attn.c_attn.weight"
        ):
            ds_engine.init_inference(build(), zero=STAGE_3, checkpoint="less.bin", base_dir=folder)
        dist.barrier()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    values = build().state_dict()
    torch.save(values | {"transformer.ln_f.bias": torch.zeros(3)}, tmp_path / "shape.pt")
    with pytest.raises(
        ds_engine.CheckpointError, match=r"ln_f.bias is stored as \(3,\), but the model has \(16,\)"
    ):
        ds_engine.init_inference(build(), checkpoint=str(tmp_path / "shape.pt"))
    torch.save(values | {"more": torch.zeros(3)}, tmp_path / "more.pt")
    with pytest.warns(UserWarning, match="1 stored tensors are not in the model: more"):
        ds_engine.init_inference(build(), checkpoint=str(tmp_path / "more.pt"))
    with pytest.raises(FileNotFoundError, match=r"contains no weights: looked for"):
        ds_engine.init_inference(build(), checkpoint=str(tmp_path / "nothing"))
    (tmp_path / "bad.safetensors").write_bytes(b"\x09" + bytes(7) + b'{"a": 123' + bytes(20))
    with pytest.raises(ds_engine.CheckpointError, match="not a safetensors header"):
        ds_engine.init_inference(build(), checkpoint=str(tmp_path / "bad.safetensors"))
    (tmp_path / "list.json").write_text('{"checkpoints": {"tp": []}}')
    with pytest.raises(ds_engine.CheckpointError, match="layers that were split"):
        ds_engine.init_inference(build(), checkpoint=str(tmp_path / "list.json"))


def test_parameters_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"construct it under ds_zero\.deferred_init"):
        ds_engine.init_inference(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtpe": "fp16"}, r'unknown key "dtpe" Did you mean "dtype"\?'),
        ({"dtype": "int8"}, "it must be fp32, fp16 or bf16"),
        ({"quant": {"enabled": True}}, "quant: quantised weights are not supported"),
        ({"ep_size": 2}, "ep_size: Linear: no module with stacked experts"),
        ({"ep_size": 2, "checkpoint": "x"}, "and checkpoint gives them later"),
        ({"tensor_parallel": {"mpu": object()}}, "tensor_parallel.mpu: pass tensor_parallel="),
        ({"save_mp_checkpoint_path": "x"}, "nothing to save"),
        ({"tensor_parallel": {"tp_size": 0}}, r"tensor_parallel.tp_size is 0"),
        ({"zero": {"stage": 3, "stag3": 1}}, "stag3"),
    ],
)
def test_mistakes_and_what_is_not_there(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ds_engine.ConfigError, match=message):
        ds_engine.init_inference(nn.Linear(2, 2), given)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kernel_inject", True),
        ("enable_cuda_graph", True),
        ("max_tokens", 7),
        ("injection_policy", {nn.Linear: "x"}),
    ],
)
def test_what_does_nothing_is_said(key: str, value: Any) -> None:
    with pytest.warns(UserWarning, match="it has no effect"):
        read_inference({key: value})


def test_every_key_works_is_said_to_do_nothing_or_is_refused() -> None:
    from ds_engine.config.sections.inference import REFUSED

    works = {
        "moe",
        "ep_size",
        "dtype",
        "tensor_parallel",
        "mp_size",
        "zero",
        "checkpoint",
        "base_dir",
        "keep_module_on_host",
    }
    assert works | set(IGNORED) | set(REFUSED) == set(InferenceConfig.model_fields)
    assert not works & set(IGNORED) and not works & set(REFUSED) and not set(IGNORED) & set(REFUSED)


def test_a_key_with_two_values() -> None:
    with pytest.raises(ValueError, match="Conflicting argument 'dtype'"):
        ds_engine.init_inference(nn.Linear(2, 2), {"dtype": "fp32"}, dtype="bf16")
    assert (
        ds_engine.init_inference(nn.Linear(2, 2), {"dtype": "bf16"}, dtype="bf16").weight.dtype
        == torch.bfloat16
    )
