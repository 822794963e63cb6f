"""Runs the blocks of one page, in the order in which a reader meets them.

`DS_WRITE_OUTPUTS=1 ci/test tests/docs/test_pages.py` puts what blocks print into the `output` blocks that differ.
"""

from __future__ import annotations

import contextlib
import doctest
import functools
import importlib.metadata
import io
import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from docs.blocks import ROOT, Block, blocks

_OF_A_RANK = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DS_TEST_FULL",
)
_OWN = re.compile(r"(ds (config|plan|checkpoint|doctor) [^|&;<\n]*\n|#[^\n]*\n|\n)+")
_LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_page(page: str, folder: Path) -> str:
    """Runs a page on this rank in `folder`; returns what it printed. Raises whatever a block raises, and AssertionError
    where a command ends with another status, or prints something else, than the page says."""
    os.chdir(folder)
    os.environ["COLUMNS"] = "100"  # of tables that fit the terminal
    module = types.ModuleType("page")
    sys.modules["page"] = module  # classes that a page defines can be pickled
    outputs: list[str | None] = []  # of each block that prints; None where it was not run
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        if "not run" in block.directives or (
            "full" in block.directives and not os.environ.get("DS_TEST_FULL")
        ):
            outputs.append(None)
        elif "output" in block.directives:
            _compare(page, block, outputs[-1])
        elif "file" in block.directives:
            _on_rank_0(functools.partial(_write, Path(block.directives["file"]), block.code))
        elif block.language == "python":
            outputs.append(_python(page, block, vars(module)))
        elif block.language == "sh":
            run = _own_commands if _OWN.fullmatch(block.code) else _commands
            outputs.append(_on_rank_0(functools.partial(run, page, block)))
        elif block.language == "json":
            _configuration(block)
    return "".join(output or "" for output in outputs)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _python(page: str, block: Block, namespace: dict[str, Any]) -> str:
    out = io.StringIO()
    # Tracebacks and inspect.getsource find the lines in the page.
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            exec(code, namespace)
    finally:
        print(out.getvalue(), end="")
    return out.getvalue()


def _commands(page: str, block: Block) -> str:
    environ = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    expected = int(block.directives.get("exit", "0"))
    told = (
        f"{page}:{block.line} ended with {result.returncode}:\n{block.code}\n{result.stdout}{result.stderr}"
    )
    assert result.returncode == expected, told
    return result.stdout + result.stderr


def _own_commands(page: str, block: Block) -> str:
    """Commands of `ds` that start no rank, in this process: it has loaded torch already."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="ds")
    printed = ""
    for line in block.code.splitlines():
        words, out, status = shlex.split(line, comments=True), io.StringIO(), 0
        if not words:
            continue
        words, file = (words[: words.index(">")], words[-1]) if ">" in words else (words, None)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
        ):
            patch.setattr(sys, "argv", words)
            try:
                entry.load()()
            except SystemExit as end:
                status = end.code or 0
        assert status == int(block.directives.get("exit", "0")), f"{page}: {line}: {status}\n{out.getvalue()}"
        if file is not None:
            Path(file).write_text(out.getvalue(), encoding="utf-8")
        else:
            printed += out.getvalue()
    return printed


def _configuration(block: Block) -> None:
    """A configuration, or some of its keys, is one that the engine takes."""
    from ds_engine.config import load

    text = block.code.strip()
    load(json.loads(text if text.startswith("{") else f"{{{text}}}"))


def _compare(page: str, block: Block, printed: str | None) -> None:
    assert block.language == "text", f"{page}:{block.line}: an output stands in a block of text"
    if printed is None or (dist.is_initialized() and dist.get_rank() > 0):
        return  # its command was not run; other ranks print what they like
    ours = doctest.OutputChecker().check_output(block.code, printed, _LOOSE)
    if not ours and os.environ.get("DS_WRITE_OUTPUTS"):
        path = ROOT / page
        trimmed = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
        old, new = (f"<!-- output -->\n```text\n{code}```" for code in (block.code, trimmed))
        _write(path, path.read_text(encoding="utf-8").replace(old, new, 1))
        return
    assert ours, f"{page}:{block.line} shows\n{block.code}\nand the block before it prints\n{printed}"


def _on_rank_0(action: Callable[[], Any]) -> Any:
    """Runs it on one rank, where several share the page's folder; the others wait for it."""
    result = action() if not dist.is_initialized() or dist.get_rank() == 0 else None
    if dist.is_initialized():
        dist.barrier()
    return result
