"""The indexes of the documentation name every page once."""

from __future__ import annotations

import re

import pytest

from docs.blocks import ROOT

DOCS = ROOT / "docs"


def linked(page: str) -> list[str]:
    return re.findall(r"\]\(([\w./-]+\.md)\)", (DOCS / page).read_text(encoding="utf-8"))


def test_every_guide_and_example_is_in_the_index():
    pages = {f"guide/{path.name}" for path in DOCS.glob("guide/*.md")}
    pages |= {path.relative_to(DOCS).as_posix() for path in DOCS.glob("examples/*/README.md")}
    assert pages - set(linked("README.md")) == set()


@pytest.mark.parametrize("folder", ["decisions", "benchmarks"])
def test_every_page_of_a_folder_is_in_its_index_once(folder):
    pages = sorted(path.name for path in (DOCS / folder).glob("*.md") if path.name != "README.md")
    assert sorted(linked(f"{folder}/README.md")) == pages
