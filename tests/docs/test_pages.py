"""Every code block of the documentation runs, or its page says why it does not."""

from __future__ import annotations

import re

import pytest

from docs.blocks import DIRECTIVES, LANGUAGES, ROOT, Block, blocks, num_ranks, pages
from docs.running import run_page
from harness import ranks

TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in pages()}
BLOCKS = {page: blocks(text) for page, text in TEXTS.items()}


def runs(block: Block) -> bool:
    return block.language != "text" and "not run" not in block.directives


# README.md: test_readme.py, on one rank and on two.
RUN = [page for page in BLOCKS if page != "README.md" and any(runs(block) for block in BLOCKS[page])]
ALONE = [page for page in RUN if num_ranks(BLOCKS[page]) == 1]
TOGETHER = [page for page in RUN if num_ranks(BLOCKS[page]) == 2]


@ranks(1, timeout_s=240.0, groups_may_stay=True)
@pytest.mark.parametrize("page", ALONE)
def test_page_runs(page, tmp_path):
    run_page(page, tmp_path)


@ranks(2, timeout_s=240.0, groups_may_stay=True)
@pytest.mark.parametrize("page", TOGETHER)
def test_page_runs_on_ranks(page, tmp_path):
    run_page(page, tmp_path)


def test_every_page_that_has_something_to_run_is_run():
    assert sorted(ALONE + TOGETHER) == RUN


@pytest.mark.parametrize("page", [page for page in BLOCKS if BLOCKS[page]])
def test_blocks_say_what_they_are(page):
    wrong = [
        f"line {block.line}: ```{block.language} with {block.directives}"
        for block in BLOCKS[page]
        if block.language not in LANGUAGES or not set(block.directives) <= set(DIRECTIVES)
    ]
    assert not wrong, f"languages are {LANGUAGES}, comments {DIRECTIVES}: {wrong}"
    unexplained = [
        block.line for block in BLOCKS[page] if len(block.directives.get("not run", "a reason")) < 8
    ]
    assert not unexplained, f"<!-- not run: --> without a reason above lines {unexplained}"
    empty = [block.line for block in BLOCKS[page] if "output" in block.directives and not block.code.strip()]
    assert not empty, (
        f"outputs at lines {empty} are empty: DS_WRITE_OUTPUTS=1 ci/test tests/docs/test_pages.py"
    )
    # A fence that does not close, or closes with another indentation, would hide what is in it.
    assert len(re.findall(r"^ *```", TEXTS[page], re.MULTILINE)) == 2 * sum(
        _is_fenced(page, b) for b in BLOCKS[page]
    )


@pytest.mark.parametrize("page", [page for page in BLOCKS if BLOCKS[page]])
def test_no_code_is_called_text(page):
    code = re.compile(
        r"^\s*(\$ |(ds|pip|python3?|torchrun|srun|mpirun|\./ci/\w+|ci/\w+|import|from) \S)", re.MULTILINE
    )
    hidden = [block.line for block in BLOCKS[page] if block.language == "text" and code.search(block.code)]
    assert not hidden, (
        f"blocks at lines {hidden} look like code: name their language, or say why they are not run"
    )


def _is_fenced(page: str, block: Block) -> bool:
    return TEXTS[page].splitlines()[block.line - 2].lstrip().startswith("```")
