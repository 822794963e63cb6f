"""The code blocks of a page of documentation, and what stands beside them about how they run.

A block is fenced and names its language: `python`, `sh`, `json`, or `text` for what is not run. A comment directly
above a block changes what is done with it (a blank line may stand between):

    <!-- not run: reason -->        left alone
    <!-- file: train.py -->         written to that file of the page's working folder
    <!-- exit: 1 -->                a command that ends with this status
    <!-- output -->                 a `text` block: what the block before it printed; `...` stands for anything
    <!-- full: reason -->           only run by `ci/test --full`
    <!-- ranks: 2 -->               above the first block: the page runs on so many ranks

Code that a page needs and a reader does not is in a comment of its own:

    <!-- hidden
    x = torch.ones(3)
    -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("python", "sh", "json", "text")
DIRECTIVES = ("not run", "file", "exit", "output", "full", "ranks")

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\s`]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_HIDDEN = re.compile(r"^<!-- hidden\n(?P<code>.*?)^-->$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (?P<name>[a-z ]+?)(?:: (?P<value>[^\n]*?))? -->")


@dataclass(frozen=True)
class Block:
    """One block: its code without indentation, the line of its first line of code, and the comments above it."""

    language: str
    code: str
    line: int
    directives: dict[str, str]


def pages() -> list[str]:
    """Every page whose blocks are held to run, relative to the root of the repository."""
    patterns = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "packages/*/README.md")
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def blocks(text: str) -> list[Block]:
    """The blocks of a page from top to bottom; hidden code has the language "python"."""
    matches = sorted([*_FENCE.finditer(text), *_HIDDEN.finditer(text)], key=lambda match: match.start())
    return [_block(text, match) for match in matches]


def num_ranks(page: list[Block]) -> int:
    """On how many ranks a page runs; 1 unless its first block says otherwise."""
    return int(page[0].directives.get("ranks", "1")) if page else 1


def _block(text: str, match: re.Match[str]) -> Block:
    groups = match.groupdict()
    indent = groups.get("indent") or ""
    code = re.sub(rf"^{indent}", "", groups["code"], flags=re.MULTILINE)
    line = text.count("\n", 0, match.start("code")) + 1
    return Block(groups.get("language", "python"), code, line, dict(_directives(text[: match.start()])))


def _directives(before: str) -> Iterator[tuple[str, str]]:
    """Comments that end directly above a block, the nearest first."""
    while comment := re.search(r"(?:^|\n) *(<!-- [^\n]* -->)\s*\Z", before):
        parts = _COMMENT.fullmatch(comment.group(1))
        if parts is None:
            return
        yield parts["name"], parts["value"] or ""
        before = before[: comment.start(1)]
