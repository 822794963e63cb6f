"""The README keeps its promises: its examples run, alone and on two ranks, and are short; links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from docs.blocks import pages
from docs.running import run_page
from harness import ranks

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_it_has_three_examples_of_at_most_12_lines():
    assert len(EXAMPLES) == 3
    assert all(len([line for line in block.splitlines() if line.strip()]) <= 12 for block in EXAMPLES)


@ranks(1, 2, timeout_s=240.0)
def test_examples(tmp_path, world_size):
    printed = run_page("README.md", tmp_path)
    everything = [""] * world_size
    dist.all_gather_object(everything, printed)
    printed = "".join(everything)
    norms = re.findall(r"rank \d: norm ([\d.]+)", printed)
    assert len(norms) == world_size
    assert len(set(norms)) == 1
    differences = [float(d) for d in re.findall(r"largest difference: ([\d.e-]+)", printed)]
    assert len(differences) == world_size
    assert max(differences) < 1e-6
    assert len(list((tmp_path / "checkpoints").glob("global_step2"))) == 1


def test_first_example_under_torchrun(tmp_path):
    script = tmp_path / "example.py"
    # As a user would end it; the process group warns when it is left open.
    script.write_text(EXAMPLES[0] + "\ntorch.distributed.destroy_process_group()\n", encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, "-W", "error", *launcher, str(script)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"rank \d: norm ([\d.]+)", result.stdout)) == 2


def test_the_commands_exist():
    commands = re.findall(r"^\./(ci/\w+)", TEXT, re.MULTILINE)
    assert commands[:2] == ["ci/train", "ci/test"]
    assert all((ROOT / command).stat().st_mode & 0o111 for command in commands)


def test_table_names_every_package():
    table = re.findall(r"^\| \[(ds-[a-z0-9-]+)\]\(packages/\1\)", TEXT, re.MULTILINE)
    assert sorted(table) == sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))


@pytest.mark.parametrize("page", [*pages(), "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    missing = [t for t in targets if "://" not in t and not ((ROOT / page).parent / t).exists()]
    assert missing == []
