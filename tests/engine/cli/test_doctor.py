"""`ds doctor`: each finding on a machine that is as it should be, and on one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ds_engine.cli import doctor
from ds_engine.cli.doctor import Finding
from engine.launching import clean_environ


def _versions(**other: str) -> dict[str, str]:
    return {
        **dict.fromkeys(doctor.PACKAGES, "0.1.0"),
        **{k.replace("_", "-"): v for k, v in other.items()},
    }


def _bad(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status != "ok"]


def test_the_rank_that_a_script_would_have() -> None:
    assert doctor.check_launcher({}).value.startswith("a single process")
    inside = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    inside |= {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    finding = doctor.check_launcher(inside)
    assert finding.status == "ok" and "by mpi: OMPI_COMM_WORLD_RANK=1" in finding.value
    (refused,) = _bad([doctor.check_launcher({**inside, "RANK": "0", "WORLD_SIZE": "2", "PMIX_RANK": "1"})])
    assert "RANK=0 and OMPI_COMM_WORLD_RANK=1" in refused.value and refused.status == "error"


def test_here() -> None:
    command = [sys.executable, "-m", "ds_engine", "doctor"]
    told = subprocess.run(
        [*command, "--json"], env=clean_environ(), capture_output=True, text=True, check=False
    )
    result = json.loads(told.stdout)
    names = [row["name"] for row in result["findings"]]
    for name in (
        "python",
        *doctor.PACKAGES,
        "torch",
        "devices",
        "gloo",
        "cores",
        "memory",
        "huge pages",
        "ulimit -l",
    ):
        assert name in names
    assert {"CPU kernels", "ds_core"} & set(names)
    errors = [row for row in result["findings"] if row["status"] == "error"]
    assert result["ok"] is True, errors
    assert told.returncode == 0
    assert all(row["remedy"] for row in result["findings"] if row["status"] != "ok")


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show_table([Finding("a thing", "[as it is]"), Finding("another", "broken", "error", "mend it")])
    shown = capsys.readouterr().out
    assert "[as it is]" in shown
    assert "error: another: mend it" in shown
    assert "no problems found" not in shown
    doctor.show_table([Finding("a thing", "fine")])
    assert "no problems found" in capsys.readouterr().out


def test_versions() -> None:
    assert not _bad(list(doctor.check_versions(_versions(ds_pipe="0.1.0"))))
    (mixed,) = _bad(list(doctor.check_versions(_versions(ds_zero="0.2.0"))))
    assert mixed == Finding(
        "ds-zero",
        "0.2.0, but ds-engine is 0.1.0",
        "error",
        "all packages must have the same version: pip install ds-zero==0.1.0",
    )
    missing = {name: version for name, version in _versions().items() if name != "ds-core"}
    (absent,) = _bad(list(doctor.check_versions(missing)))
    assert (absent.name, absent.value, absent.status) == ("ds-core", "not installed", "error")
    assert "pip install ds-core==0.1.0" in absent.remedy


def test_a_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    (old,) = _bad(list(doctor.check_torch()))
    assert (old.name, old.status) == ("torch", "error")
    assert "2.11" in old.remedy
    monkeypatch.setattr(torch, "__version__", "2.14.0a0+git123")
    assert not _bad(list(doctor.check_torch()))


def test_a_torch_without_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_backend_available", lambda name: False)
    findings = {finding.name: finding for finding in doctor.check_torch()}
    assert findings["gloo"].status == "error"


def test_a_broken_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ds_core._native", None)
    (finding,) = doctor.check_native()
    assert (finding.name, finding.status) == ("ds_core", "error")
    assert "cannot be imported" in finding.value
    assert "pip install" in finding.remedy


def test_the_cpu_target_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def cpu_target(self) -> str:
            return "avx2"

        def available_cpu_targets(self) -> list[str]:
            return ["baseline", "avx2"]

    native = types.SimpleNamespace(MISSING=None, core=Core())
    monkeypatch.setitem(sys.modules, "ds_core._native", native)
    (finding,) = doctor.check_native()
    assert finding.name == "CPU kernels"
    assert finding.value.startswith("avx2 (this machine can run: baseline, avx2)")
    native.MISSING = "no such file"
    (finding,) = doctor.check_native()
    assert (finding.name, finding.status) == ("ds_core", "warning")
    assert "no such file" in finding.value


def test_limits(tmp_path: Path) -> None:
    assert doctor.check_shm(2 << 30).status == "ok"
    assert "--shm-size" in doctor.check_shm(64 << 20).remedy
    assert doctor.check_locked_memory(-1) == Finding("ulimit -l", "unlimited")
    assert doctor.check_locked_memory(8 << 20).status == "warning"
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    assert doctor.check_huge_pages(setting) == Finding("huge pages", "madvise")
    setting.write_text("always madvise [never]\n")
    assert doctor.check_huge_pages(setting).status == "warning"
    assert doctor.check_huge_pages(tmp_path / "none").status == "warning"


def _command(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_strangers_on_the_path(tmp_path: Path) -> None:
    ours = _command(tmp_path / "ours", "ds", "#!/usr/bin/python\nfrom ds_engine.cli.main import main\n")
    theirs = _command(tmp_path / "theirs", "ds", "#!/bin/sh\necho I am an editor\n")
    _command(
        tmp_path / "theirs", "deepspeed", "#!/usr/bin/python\nfrom deepspeed.launcher.runner import main\n"
    )
    (tmp_path / "theirs" / "ds_report").write_text("not looked at")

    def check(*folders: str, deepspeed: str | None = None, compat: bool = False) -> dict[str, Finding]:
        path = os.pathsep.join(str(tmp_path / folder) for folder in folders)
        return {f.name: f for f in doctor.check_strangers({"PATH": path}, deepspeed, compat)}

    assert check("ours") == {}
    assert not _bad(list(check("ours", "theirs").values()))
    shadowed = check("theirs", "ours")["foreign ds"]
    assert shadowed.status == "warning"
    assert shadowed.value == str(theirs)
    assert "python -m ds_engine" in shadowed.remedy
    assert doctor.find_commands("ds", f"{ours.parent}{os.pathsep}{ours.parent}") == [ours]
    assert "import deepspeed" in check("ours", deepspeed="0.19.6")["deepspeed"].value
    assert check("ours", deepspeed="0.19.6", compat=True) == {}
