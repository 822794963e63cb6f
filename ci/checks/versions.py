"""Checks that VERSION is the version of every package and that siblings are pinned to exactly it.

python ci/checks/versions.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def check(version: str, projects: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong; `projects` maps a package's name to the [project] table of its pyproject.toml."""
    wrong = []
    for name, project in projects.items():
        if project.get("name") != name:
            wrong.append(f"{name}: the folder and [project] name = {project.get('name')!r} differ")
        if project.get("version") != version:
            wrong.append(f"{name}: version is {project.get('version')!r}, VERSION says {version!r}")
        requirements = [*project.get("dependencies", [])]
        for extra in project.get("optional-dependencies", {}).values():
            requirements += extra
        for requirement in requirements:
            sibling = re.match(r"ds-[a-z0-9-]+", requirement)
            if sibling and sibling.group() not in projects:
                wrong.append(f"{name}: needs {requirement!r}, which is no package of this repository")
            elif sibling and requirement != f"{sibling.group()}=={version}":
                wrong.append(f"{name}: {requirement!r} has to be '{sibling.group()}=={version}'")
    return wrong


def main() -> int:
    """Prints what is wrong; 1 if there is anything."""
    version = (ROOT / "VERSION").read_text(encoding="utf-8").strip()
    projects = {
        path.parent.name: tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        for path in sorted(ROOT.glob("packages/*/pyproject.toml"))
    }
    wrong = check(version, projects)
    if f"## [{version}]" not in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"):
        wrong.append(f"CHANGELOG.md has no section [{version}]")
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
