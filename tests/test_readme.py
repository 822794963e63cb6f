"""The README keeps its promises: the examples run, alone and on two ranks, and are short; what it links to is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_it_has_three_examples_of_at_most_12_lines():
    assert len(EXAMPLES) == 3
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 12 for block in EXAMPLES)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", range(3))
def test_example(number, ranks, tmp_path):
    script = tmp_path / "example.py"
    # As a user would end it; the process group warns when it is left open.
    end = "\nimport torch.distributed as dist\nif dist.is_initialized():\n    dist.destroy_process_group()\n"
    script.write_text(EXAMPLES[number] + end, encoding="utf-8")
    command = [sys.executable, "-W", "error", str(script)]
    if ranks > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(script),
        ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    if number == 0:
        norms = re.findall(r"rank \d: norm ([\d.]+)", result.stdout)
        assert len(norms) == ranks
        assert len(set(norms)) == 1
    elif number == 1:
        differences = [float(d) for d in re.findall(r"largest difference: ([\d.e-]+)", result.stdout)]
        assert len(differences) == ranks
        assert max(differences) < 1e-6
    else:
        assert len(list((tmp_path / "checkpoints").glob("global_step2"))) == 1


def test_two_commands_exist():
    commands = re.findall(r"^\./(ci/\w+)", TEXT, re.MULTILINE)
    assert commands == ["ci/train", "ci/test"]
    assert all((ROOT / command).stat().st_mode & 0o111 for command in commands)


def test_table_names_every_package():
    table = re.findall(r"^\| \[(ds-[a-z0-9-]+)\]\(packages/\1\)", TEXT, re.MULTILINE)
    assert sorted(table) == sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "packages/*/README.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert missing == []
