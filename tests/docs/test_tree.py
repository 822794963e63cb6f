"""The page that maps the tree names every room, and nothing that is not there."""

from __future__ import annotations

import re

from docs.blocks import ROOT

TEXT = (ROOT / "docs" / "tree.md").read_text(encoding="utf-8")
SOURCES = [path for path in ROOT.glob("packages/*/src") if path.is_dir()]


def test_what_is_named_exists():
    named = re.findall(r"`((?:ds_[a-z]+|cpp)/[\w./]*)`", TEXT)
    assert len(named) > 30
    missing = [name for name in named if not any((place / name).exists() for place in (ROOT, *SOURCES))]
    assert missing == []


def test_every_room_is_named():
    rooms = {
        path.parent.relative_to(source).as_posix()
        for source in SOURCES
        for path in source.glob("ds_*/*/__init__.py")  # doors inside of a room are its own matter
    }
    assert rooms - set(re.findall(r"`(ds_[a-z]+/\w+)`", TEXT)) == set()


def test_every_package_and_folder_of_the_top_level_is_named():
    packages = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
    assert packages - set(re.findall(r"\bds-[a-z0-9-]+", TEXT)) == set()
    folders = {path.parent.name for path in ROOT.glob("*/*") if not path.parent.name.startswith(".")}
    assert folders - set(re.findall(r"^(\w+)/", TEXT, re.MULTILINE)) <= {"build", "dist", "runs"}
