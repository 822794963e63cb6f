"""Checkpoints that DeepSpeed wrote: read, gone on from, exported. They lie in tests/golden/deepspeed."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_engine
from ds_checkpoint import CheckpointError, convert, deepspeed, load_into, open_checkpoint, state_dict
from ds_checkpoint.deepspeed import inert
from ds_checkpoint.export import export
from harness import ranks

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "deepspeed"
SHARDED = ["stage1-bf16", "stage2-fp32", "stage3-bf16", "universal"]
ALL = ["stage0-bf16", *SHARDED]


def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_job", GOLDEN / "job.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def facts(name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((GOLDEN / name / "facts.json").read_text())
    return read


@pytest.mark.parametrize("name", ["stage1-bf16", "stage2-fp32"])
def test_masters_are_those_of_the_16_bit_or_fp32_parameters_beside_them(name: str) -> None:
    with open_checkpoint(GOLDEN / name) as checkpoint:
        beside = inert.read(checkpoint.path / "mp_rank_00_model_states.pt")["module"]
        trained = [fqn for fqn, states in checkpoint.manifest.tensors.items() if "exp_avg" in states]
        assert len(trained) == 7
        for fqn in trained:
            assert torch.equal(checkpoint.tensor(fqn).to(beside[fqn].dtype), beside[fqn]), fqn


# Not stage2-fp32: with round_robin_gradients DeepSpeed's own access functions mix parameters up.
@pytest.mark.parametrize("name", ["stage1-bf16", "stage3-bf16", "universal"])
def test_values_are_those_that_deepspeed_itself_reports(name: str) -> None:
    with open_checkpoint(GOLDEN / name) as checkpoint:
        expected = facts(name)["expected"]
        assert len(expected) >= 7
        for key, values in expected.items():
            fqn, state = key.split("/")
            assert checkpoint.tensor(fqn, state).flatten().tolist() == values, key
        assert checkpoint.manifest.values["client_state"] == {"epoch": 3, "note": "hello"}
        assert checkpoint.tensor("scale", "buffer").tolist() == [1.0, 0.5, 2.0]
        assert sorted(checkpoint.manifest.values["frozen"]) == ["frozen.bias", "frozen.weight"]


def train(name: str, stage: int, *, groups: int | None = None) -> tuple[list[float], dict[str, Any]]:
    """Load into a new engine on this number of ranks, and go on."""
    work, known = job(), facts(name)
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = dist.get_world_size() if dist.is_initialized() else 1
    net = work.model()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()  # every value has to come from the checkpoint
    config = work.config(stage, known["precision"], size) | {"startup_summary": False}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.01}}
    engine, *_ = ds_engine.initialize(
        model=net, model_parameters=work.groups(net, groups or known["groups"]), config=config
    )
    with engine:
        path, client = engine.load_checkpoint(GOLDEN / name)
        assert engine.global_steps == work.STEPS_BEFORE and Path(path).parent == GOLDEN / name
        losses = []
        for step in range(work.STEPS_BEFORE, work.STEPS_BEFORE + work.STEPS_AFTER):
            loss = engine(*work.batch(step, rank, size))
            engine.backward(loss)
            engine.step()
            mean = loss.detach().float().clone()
            if size > 1:
                dist.all_reduce(mean)
            losses.append(mean.item() / size)
    return losses, client


@ranks(1, 2)
@pytest.mark.parametrize(
    ("name", "stage"), [("stage1-bf16", 3), ("stage2-fp32", 1), ("stage3-bf16", 2), ("universal", 0)]
)
def test_training_goes_on_with_the_same_losses_on_another_number_of_ranks(name: str, stage: int) -> None:
    losses, client = train(name, stage)
    known = facts(name)
    tolerance = 1e-5 if known["precision"] == "fp32" else 2e-2
    assert losses == pytest.approx(known["after"], rel=tolerance)
    assert losses != pytest.approx(known["before"], rel=tolerance)
    assert client == {"epoch": 3, "note": "hello"}


@ranks(2)
def test_stage_0_numbers_its_states_and_the_engine_knows_the_names() -> None:
    losses, _ = train("stage0-bf16", 3)
    assert losses == pytest.approx(facts("stage0-bf16")["after"], rel=2e-2)


def test_stage_0_with_frozen_parameters_is_not_guessed_at() -> None:
    with (
        pytest.warns(UserWarning, match="states are left out"),
        open_checkpoint(GOLDEN / "stage0-bf16") as checkpoint,
    ):
        assert {state for states in checkpoint.manifest.tensors.values() for state in states} == {
            "param",
            "buffer",
        }


@pytest.mark.parametrize("name", SHARDED)
def test_whole_state_dict_fits_the_model_and_ties_it(name: str) -> None:
    work = job()
    values = state_dict(GOLDEN / name)
    net = work.Net()
    assert set(values) == set(net.state_dict())
    assert values["head.weight"] is values["emb.weight"]
    load_into(net, GOLDEN / name)
    if name != "stage2-fp32":  # see above
        assert net.emb.weight.flatten().tolist() == facts(name)["expected"]["emb.weight/param"]
    assert "frozen.weight" not in state_dict(GOLDEN / name, exclude_frozen=True)


def test_converted_to_our_format_it_says_the_same_and_is_checksummed(tmp_path: Path) -> None:
    made = Path(convert(GOLDEN / "stage3-bf16", tmp_path))
    with open_checkpoint(tmp_path) as ours, open_checkpoint(GOLDEN / "stage3-bf16") as theirs:
        assert ours.path == made and not list(ours.verify())
        assert ours.manifest.tensors.keys() == theirs.manifest.tensors.keys()
        for fqn, states in theirs.manifest.tensors.items():
            for state in states:
                assert torch.equal(ours.tensor(fqn, state), theirs.tensor(fqn, state))
        assert ours.manifest.values["optimizer"] == theirs.manifest.values["optimizer"]
    file = next(made.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with open_checkpoint(tmp_path) as ours:
        assert len(list(ours.verify())) == 1


@pytest.mark.parametrize("layout", ["safetensors", "pt"])
def test_exported_shards_are_what_hugging_face_reads(layout: Any, tmp_path: Path) -> None:
    done = export(GOLDEN / "stage2-fp32", tmp_path, layout=layout, max_shard_bytes=600)
    assert len(done.files) > 1
    suffix = "model.safetensors" if layout == "safetensors" else "pytorch_model.bin"
    index = json.loads((tmp_path / f"{suffix}.index.json").read_text())
    assert index["metadata"]["total_size"] == done.num_bytes
    found: dict[str, torch.Tensor] = {}
    for file in set(index["weight_map"].values()):
        if layout == "pt":
            found |= torch.load(tmp_path / file)
        else:
            from safetensors import safe_open

            with safe_open(tmp_path / file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is not a dict
    expected = state_dict(GOLDEN / "stage2-fp32")
    tied = set() if layout == "pt" else {"head.weight"}
    assert found.keys() == expected.keys() - tied == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with pytest.raises(FileExistsError, match="exists"):
        export(GOLDEN / "stage2-fp32", tmp_path, layout=layout, max_shard_bytes=600)


def test_what_a_pickle_names_is_not_imported_or_called(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    file = tmp_path / "trap.pt"
    torch.save({"trap": Trap(), "ok": torch.ones(2)}, file)
    content = inert.read(file)
    assert content["ok"].tolist() == [1, 1] and isinstance(content["trap"], inert.Stand)
    assert not (tmp_path / "sprung").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "sprung").exists()  # it would have


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("zero_pp_rank_1_mp_rank_00_model_states.pt", "no model states of rank 1"),
        (
            "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
            "was written by 3 ranks, but has 2 optimizer files",
        ),
        ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "no optimizer states of rank 0"),
    ],
)
def test_a_copy_that_is_not_complete(gone: str, message: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "stage3-bf16", tmp_path / "c")
    (tmp_path / "c" / "global_step3" / gone).unlink()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "c")


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "stage3-bf16", tmp_path / "c")
    file = tmp_path / "c" / "global_step3" / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path / "c")
    file.write_bytes(pickle.dumps({"module": {}}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path / "c")
    shutil.copy(
        file.with_name("zero_pp_rank_0_mp_rank_00_model_states.pt"),
        file.with_name("mp_rank_01_model_states.pt"),
    )
    with pytest.raises(CheckpointError, match="model-parallel"):
        open_checkpoint(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        open_checkpoint(tmp_path)


def test_our_own_checkpoints_export_too(tmp_path: Path) -> None:
    work = job()
    net = work.model()
    config = work.config(2, "bf16", 1) | {"startup_summary": False, "optimizer": {"type": "AdamW"}}
    engine, *_ = ds_engine.initialize(model=net, model_parameters=work.groups(net, 2), config=config)
    with engine:
        engine.backward(engine(*work.batch(0, 0, 1)))
        engine.step()
        engine.save_checkpoint(tmp_path / "c")
        params = {n: p.detach().clone() for n, p in net.named_parameters(remove_duplicate=False)}
    values = state_dict(tmp_path / "c")
    assert values.keys() == net.state_dict().keys()
    assert all(torch.equal(values[n].bfloat16(), p) for n, p in params.items())
    assert values["head.weight"] is values["emb.weight"]
    assert "frozen.bias" not in state_dict(tmp_path / "c", exclude_frozen=True)
    stored = state_dict(tmp_path / "c", dtype=torch.bfloat16)
    assert all(stored[n].dtype == torch.bfloat16 for n in params)


def test_which_folder_is_a_checkpoint_of_deepspeeds(tmp_path: Path) -> None:
    root = GOLDEN / "stage3-bf16"
    assert deepspeed.locate(root, None) == deepspeed.locate(root, "global_step3") == root / "global_step3"
    assert deepspeed.locate(root / "global_step3", None) == root / "global_step3"
    assert deepspeed.locate(root, "other") is None and deepspeed.locate(tmp_path, None) is None
