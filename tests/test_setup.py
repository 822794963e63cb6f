"""ci/setup: finds an interpreter that works, names or installs what is missing, and skips what is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[1] / "ci" / "setup"
# What the functions under test call, apart from what a test replaces.
TOOLS = ["bash", "cat", "cut", "dirname", "find", "mkdir", "rm", "sha256sum", "sort", "xargs", "touch", "sed"]


@pytest.fixture
def machine(tmp_path):
    """A repository with ci/setup, and a PATH that holds only what a test puts there."""
    (tmp_path / "ci").mkdir()
    shutil.copy(SETUP, tmp_path / "ci" / "setup")
    programs = tmp_path / "programs"
    programs.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (programs / tool).symlink_to(found)
    return tmp_path


def program(machine: Path, name: str, text: str) -> None:
    path = machine / "programs" / name
    path.write_text(f"#!/usr/bin/env -S {shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def run(machine: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"set -euo pipefail\n. ci/setup\n{script}"
    env = {
        "PATH": str(machine / "programs"),
        "DS_DEFINE_ONLY": "1",
        "HOME": os.environ.get("HOME", "/"),
    } | environment
    command = [str(machine / "programs" / "bash"), "-c", script]
    return subprocess.run(command, cwd=machine, env=env, capture_output=True, text=True, check=False)


def test_a_broken_interpreter_is_passed_over(machine):
    program(
        machine, "python3", "echo 'command not found' >&2; exit 127"
    )  # as the shims of version managers do
    program(machine, "python3.12", f'exec {sys.executable} "$@"')
    result = run(machine, "ds_find_python")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).resolve() == Path(sys.executable).resolve()


def test_a_named_interpreter_has_to_work(machine):
    program(machine, "python3", f'exec {sys.executable} "$@"')
    result = run(machine, "ds_find_python", PYTHON="/no/such/python")
    assert result.returncode != 0
    assert "PYTHON=/no/such/python does not run" in result.stderr


def python_without(machine: Path, *missing: str) -> None:
    """A python3 that says it lacks these: "venv", "headers"."""
    venv = "1" if "venv" in missing else "0"
    include = "/nowhere" if "headers" in missing else str(machine)
    (machine / "Python.h").touch()
    text = f"""case "$2" in
      *executable*) echo python3 ;;
      *"ensurepip, venv"*) exit {venv} ;;
      *include*) echo {include} ;;
      *%d.%d*) echo 3.11 ;;
    esac"""
    program(machine, "python3", text)


def test_missing_parts_are_named_for_a_user_who_is_not_root(machine):
    python_without(machine, "venv", "headers")
    program(machine, "id", "echo 1000")
    result = run(machine, "ds_check_system")
    assert result.returncode == 1
    assert "please install: python3.11-venv python3.11-dev g++" in result.stderr
    assert "sudo apt-get install" in result.stderr


def test_missing_parts_are_installed_by_root(machine):
    python_without(machine, "venv")
    program(machine, "id", "echo 0")
    program(machine, "apt-get", f'echo "$@" >> {machine}/calls')
    result = run(machine, "ds_check_system")
    assert result.returncode == 0, result.stderr
    calls = [call.split() for call in (machine / "calls").read_text().splitlines()]
    # Each begins with the options that make apt give up soon where no mirror answers.
    assert all("Acquire::Retries=1" in call for call in calls)
    assert [call[call.index("Acquire::Retries=1") + 1 :] for call in calls] == [
        ["update", "-q"],
        ["install", "-y", "-q", "--no-install-recommends", "python3.11-venv", "g++"],
    ]


def test_a_complete_machine_installs_nothing(machine):
    python_without(machine)
    program(machine, "g++", "")
    program(machine, "id", "echo 0")
    program(machine, "apt-get", "exit 1")
    result = run(machine, "ds_check_system")
    assert (result.returncode, result.stderr) == (0, "")


def test_no_python_at_all(machine):
    program(machine, "id", "echo 1000")
    result = run(machine, "ds_check_system")
    assert result.returncode == 1
    assert "python3" in result.stderr


def test_hash_sees_contents_and_names_but_no_times(machine):
    folder = machine / "cpp"
    folder.mkdir()
    (folder / "a.cc").write_text("one")
    first = run(machine, "ds_hash cpp").stdout
    os.utime(folder / "a.cc", (1, 1))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("cache")
    assert run(machine, "ds_hash cpp").stdout == first
    (folder / "a.cc").write_text("two")
    second = run(machine, "ds_hash cpp").stdout
    (folder / "a.cc").rename(folder / "b.cc")
    assert len({first, second, run(machine, "ds_hash cpp").stdout}) == 3


def test_a_finished_part_is_skipped_and_a_failed_one_is_not(machine):
    part = "DS_WANT={} ; ds_part native touch_and {}"
    touch = "touch_and() {{ echo made >> made; {}; }}; "
    assert run(machine, touch.format("return 1") + part.format("a", "")).returncode == 1
    assert run(machine, touch.format("true") + part.format("a", "")).returncode == 0
    assert run(machine, touch.format("true") + part.format("a", "")).returncode == 0
    assert (machine / "made").read_text().count("made") == 2
    assert run(machine, touch.format("true") + part.format("b", "")).returncode == 0
    assert (machine / "made").read_text().count("made") == 3


def test_wheels_are_built_for_every_python_that_has_its_headers(machine):
    (machine / "include").mkdir()
    (machine / "include" / "Python.h").touch()
    answers = """case "$2" in
      *"%d.%d"*) echo {version} ;;
      *include*) echo {include} ;;
      *scikit_build_core*) exit 0 ;;
    esac"""
    program(machine, "python", answers.format(version="3.11", include="-"))
    program(machine, "python3.12", answers.format(version="3.12", include=machine / "include"))
    program(machine, "python3.13", answers.format(version="3.13", include=machine / "nowhere"))
    made = machine / ".venv" / "build-python3.12" / "bin"
    made.mkdir(parents=True)
    (made / "python").symlink_to(machine / "programs" / "python3.12")
    result = run(machine, "ds_build_pythons")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["python", f"{made}/python"]
    for version in ("3.10", "3.13"):
        assert f"no wheel for Python {version}: python{version} with its headers and venv" in result.stderr
    assert "3.12" not in result.stderr


def test_a_build_needs_neither_torch_nor_our_packages(machine):
    for name in ("constraints.txt", "requirements.txt", "requirements-build.txt"):
        shutil.copy(SETUP.parent / name, machine / "ci" / name)
    for path in ("cpp/a.cc", "cmake/a.cmake", "CMakeLists.txt", "VERSION", "packages/ds-core/pyproject.toml"):
        (machine / path).parent.mkdir(parents=True, exist_ok=True)
        (machine / path).touch()
    program(machine, "wc", "echo 1")
    names = ("venv", "build", "tools", "packages", "native")
    functions = "".join(f"ds_make_{name}() {{ echo {name}; }}; " for name in names)
    functions += "ds_python_will_do() { false; }; ds_packages() { :; }; "
    assert run(machine, functions + "DS_ONLY=build; ds_setup").stdout.split() == ["venv", "build"]
    rest = run(machine, functions + "ds_setup").stdout.split()
    assert rest[-2:] == ["tools", "packages"]  # with the packages comes the native part
    assert "torch" not in (SETUP.parent / "requirements-build.txt").read_text().split()
