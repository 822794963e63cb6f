"""Whole weights for other programs: each file complete or absent, whoever else exports at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_checkpoint.export import consolidate, export
from ds_checkpoint.format.records import Record
from ds_checkpoint.write import Content, write

VALUES = {"a.weight": torch.arange(12.0).view(3, 4), "b.weight": torch.ones(5)}


def saved(root: Path, config: str | None = None) -> Path:
    records = [Record(n, "param", tuple(v.shape), 0, v.reshape(-1)) for n, v in VALUES.items()]
    write(root, "saved", lambda: Content(records=records, values={"model_config": config}))
    return root


def test_processes_that_export_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from ds_checkpoint.export import export\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for _ in range(20): export(sys.argv[1], sys.argv[2], overwrite=True)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "c", tmp_path / "out"]
    jobs = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for job in jobs:
        assert job.stdout is not None
        job.stdout.readline()
    for job in jobs:
        _, said = job.communicate(b"\n", timeout=100)
        assert job.returncode == 0, said.decode()[-1000:]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert all(
        torch.equal(v, VALUES[n]) for n, v in load_file(tmp_path / "out" / "model.safetensors").items()
    )


def test_the_place_of_one_process_is_not_that_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deterministic: while one exports, another one exports whole."""
    saved(tmp_path / "c")
    original, nested = consolidate.datafile.write, []

    def write_and_be_overtaken(path: Path, *args: object, **options: object) -> object:
        result = original(path, *args, **options)  # type: ignore[arg-type]
        if not nested:
            nested.append(path)
            export(tmp_path / "c", tmp_path / "out")
        else:
            nested.append(path)
        return result

    monkeypatch.setattr(consolidate.datafile, "write", write_and_be_overtaken)
    export(tmp_path / "c", tmp_path / "out")
    assert len(set(nested)) == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_overwriting_leaves_nothing_of_the_export_before(tmp_path: Path) -> None:
    saved(tmp_path / "c")
    out = tmp_path / "out"
    export(tmp_path / "c", out, max_shard_bytes=50)
    assert len(list(out.glob("model-*"))) == 2 and (out / "model.safetensors.index.json").exists()
    with pytest.raises(FileExistsError, match="exists: export into another directory"):
        export(tmp_path / "c", out)
    (out / "notes.safetensors").write_text("mine")
    export(tmp_path / "c", out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "notes.safetensors"]


def test_the_models_configuration_is_exported(tmp_path: Path) -> None:
    text = json.dumps({"model_type": "tiny"})
    saved(tmp_path / "c", text)
    export(tmp_path / "c", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == text
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("mine")
    export(tmp_path / "c", tmp_path / "other")
    assert (tmp_path / "other" / "config.json").read_text() == "mine"
