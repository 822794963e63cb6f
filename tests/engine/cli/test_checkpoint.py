"""`ds checkpoint`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_engine.cli.main import app

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "deepspeed" / "stage3-bf16"


def ds(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    return result.exit_code, result.output


def test_inspect_says_what_is_in_it() -> None:
    code, text = ds("inspect", GOLDEN, "--json", "--tensors")
    facts = json.loads(text)
    assert code == 0 and facts["ranks"] == 3 and facts["global_steps"] == 3 and facts["optimizer"] == "adam"
    assert facts["states"]["exp_avg"]["tensors"] == 7 and facts["tied"] == {"head.weight": "emb.weight"}
    row = {"name": "up.weight", "state": "exp_avg", "dtype": "float32", "shape": [9, 6], "coordinates": {}}
    assert row in facts["tensors"]
    code, text = ds("inspect", GOLDEN)
    assert code == 0 and "exp_avg_sq" in text and "global_step3" in text


def test_convert_verify_and_export(tmp_path: Path) -> None:
    code, text = ds("convert", GOLDEN, tmp_path / "ours", "--out-tag", "start")
    assert code == 0 and text.strip() == str(tmp_path / "ours" / "start")
    code, text = ds("verify", tmp_path / "ours")
    assert code == 0 and "no damage found" in text
    code, text = ds("export", tmp_path / "ours", tmp_path / "out", "--dtype", "bf16")
    assert code == 0 and (tmp_path / "out" / "model.safetensors").is_file() and "10 tensors" in text
    code, text = ds("export", tmp_path / "ours", tmp_path / "out")
    assert code == 1 and "exists" in text and "--overwrite" in text
    assert ds("export", tmp_path / "ours", tmp_path / "out", "--overwrite")[0] == 0
    file = next((tmp_path / "ours" / "start").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)
    code, text = ds("verify", tmp_path / "ours")
    assert code == 1 and "1 problem" in text and "1 problems" not in text


def test_verify_says_that_there_are_no_checksums_and_errors_are_one_line(tmp_path: Path) -> None:
    code, text = ds("verify", GOLDEN)
    assert code == 0 and "no checksums" in text
    code, text = ds("inspect", tmp_path)
    assert code == 1 and "no checkpoint" in text and "Traceback" not in text
    shutil.copytree(GOLDEN, tmp_path / "c")
    next((tmp_path / "c" / "global_step3").glob("*optim*")).write_bytes(b"nothing")
    code, text = ds("verify", tmp_path / "c")
    assert code == 1 and "cannot be read" in text
    code, text = ds("export", GOLDEN, tmp_path / "out", "--dtype", "fp64")
    assert code == 2


def test_verify_fails_where_latest_names_a_lost_checkpoint(tmp_path: Path) -> None:
    for tag in ("first", "second"):
        assert ds("convert", GOLDEN, tmp_path, "--out-tag", tag)[0] == 0
    shutil.rmtree(tmp_path / "second")
    with pytest.warns(UserWarning, match="'second', which does not exist"):
        code, text = ds("verify", tmp_path)
    assert code == 1 and "'latest' names 'second', which does not exist" in text and "1 problem" in text
    assert ds("verify", tmp_path, "--tag", "first")[0] == 0 and ds("verify", tmp_path / "first")[0] == 0


def test_inspect_lists_coordinates() -> None:
    experts = GOLDEN.parents[1] / "checkpoints" / "version2" / "experts"
    code, text = ds("inspect", experts, "--json", "--tensors")
    facts = json.loads(text)
    assert code == 0 and facts["axes along which values differ"] == {"expert": 2}
    rows = [
        row["coordinates"] for row in facts["tensors"] if row["name"] == "expert" and row["state"] == "param"
    ]
    assert rows == [{"expert": [0, 2]}, {"expert": [1, 2]}]
    code, text = ds("inspect", experts, "--tensors")
    assert code == 0 and "expert 0 of 2" in " ".join(text.split())
    code, text = ds("export", experts, "out")
    assert code == 1 and "several values under one name" in text
