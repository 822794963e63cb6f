"""Every rule of ci/checks/patterns.py fires on a line that breaks it, in the right files only."""

from __future__ import annotations

import re

import pytest

from checks import patterns

BAD = {
    "jit": ("packages/ds-core/src/ds_core/a.py", "from torch.utils.cpp_extension import load"),
    "machine-flags": ("cpp/CMakeLists.txt", "target_compile_options(ds PRIVATE -mavx2)"),
    "xfail-call": ("tests/core/test_a.py", "    pytest.xfail('later')"),
    "skip-reason": ("tests/core/test_a.py", "@pytest.mark.skip"),
    "wall-clock": ("tests/core/test_a.py", "    assert time.time() - start < 1"),
    "absolute-path": ("README.md", "see /home/me/file"),
    "leftover": ("packages/ds-core/src/ds_core/a.py", "    breakpoint()"),
    "wide-except": ("packages/ds-core/src/ds_core/a.py", "    except Exception: pass"),
}


@pytest.mark.parametrize("name", [rule.name for rule in patterns.RULES])
def test_rule_fires_where_it_applies(name):
    path, line = BAD[name]
    (message,) = patterns.check_text(f"# fine\n{line}\n", path)
    assert message.startswith(f"{path}:2: [{name}]")


def test_rules_are_silent_elsewhere():
    assert list(patterns.check_text("# no -march here, see the docs\n", "cmake/DsFlags.cmake")) == []
    assert list(patterns.check_text("@pytest.mark.skip(reason='no nvcc')\n", "tests/core/test_a.py")) == []
    assert list(patterns.check_text("from torch.utils.cpp_extension import load\n", "ci/bench_peer.py")) == []


def test_pre_commit_runs_the_checks_of_lint():
    hooks = (patterns.ROOT / ".pre-commit-config.yaml").read_text()
    lint = (patterns.ROOT / "ci" / "lint").read_text()
    names = {a or b for a, b in re.findall(r'^check (?:"([^"]+)"|(\S+)) ', lint, re.MULTILINE)}
    assert {"ruff", "mypy", "import-linter", "clang-format", "codespell", "budgets"} <= names
    # `shell` needs no hook: a script that does not parse fails when it is run.
    names = names - {"shell", "ruff"} | {"ruff check"}
    assert names == set(re.findall(r"^\s+name: (.+)$", hooks, re.MULTILINE))
