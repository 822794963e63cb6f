"""Environments that hold one package, what it declares, and nothing else.

What is not ours is shared by symbolic links to the running environment, found through the metadata of the installed
distributions; so such an environment is made in a second and without a network.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")))
# Those that only nvcc can build.
CUDA_PACKAGES = tuple(name for name in PACKAGES if re.search(r"-cu\d+$", name))
FULL = os.environ.get("DS_TEST_FULL") == "1"
# For this Python and the youngest GPUs only: the others take minutes, and what breaks them breaks these as a rule.
THIN = {} if FULL else {"DS_WHEELS_FOR": "this", "CUDAARCHS": "100"}
HAS_NVCC = subprocess.run([ROOT / "ci" / "has_nvcc"], check=False).returncode == 0
# May be used without being declared: the environment is "a machine with torch".
GIVEN = ("torch", "numpy")


def build_wheels(folder: Path) -> dict[str, Path]:
    """The wheels that `ci/build_wheels` makes of the tree as it is, by package, for this Python; made once, also when
    several processes ask.
    """
    digest = hashlib.sha256(repr((HAS_NVCC, THIN)).encode())
    for top in ("ci", "packages", "cpp", "cmake", "CMakeLists.txt", "VERSION"):
        for path in sorted(p for p in [ROOT / top, *(ROOT / top).rglob("*")] if p.is_file()):
            if "__pycache__" not in path.parts and path.suffix != ".so":
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    target = folder / f"{sysconfig.get_python_version()}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = folder / "unfinished"
            run(["bash", str(ROOT / "ci" / "build_wheels"), str(unfinished)], DS_VENV=sys.prefix, **THIN)
            unfinished.rename(target)
    return {
        normalised(name): wheel
        for wheel in target.glob("*.whl")
        for name, _, _, tags in [parse_wheel_filename(wheel.name)]
        if not tags.isdisjoint(sys_tags())
    }


def run(command: list[str], *, cwd: Path | None = None, **variables: str) -> str:
    """Standard output of a command; its standard error is in the message when it fails.

    Args:
        command: program and arguments.
        cwd: where it runs.
        variables: added to the environment.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | variables
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        check=False,
        cwd=cwd,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def requirements(name: str) -> Iterator[str]:
    """Normalised names of what the distribution `name` needs here, without its extras."""
    if name in PACKAGES:  # from the source: those that only nvcc builds may not be installed here
        project = tomllib.loads((ROOT / "packages" / name / "pyproject.toml").read_text(encoding="utf-8"))
        texts = project["project"].get("dependencies", [])
    else:
        texts = importlib.metadata.requires(name) or []
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield normalised(requirement.name)


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names: list[str]) -> set[str]:
    """`names` and everything they need, directly or not."""
    found: set[str] = set()
    waiting = [normalised(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += requirements(name)
    return found


def link(name: str, site: Path) -> None:
    """Links every top-level file and folder of an installed distribution into `site`."""
    for file in importlib.metadata.distribution(name).files or []:
        top = file.parts[0]
        if top not in ("..", "__pycache__") and not (site / top).exists():
            base = Path(str(importlib.metadata.distribution(name).locate_file("")))
            (site / top).symlink_to(base / top)


@dataclass(frozen=True)
class Bare:
    """One environment."""

    python: Path
    packages: frozenset[str]
    """Those of ours that are in it."""

    def run(self, code: str, folder: Path) -> str:
        """Runs Python code in `folder`, isolated from the surrounding environment; warnings are errors."""
        return run([str(self.python), "-I", "-W", "error", "-c", code], cwd=folder)


def make(package: str, wheels: dict[str, Path], folder: Path) -> Bare:
    """An environment with `package` from its wheel."""
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    python = folder / "bin" / "python"
    site = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    needed = closure([package, *GIVEN])
    ours = sorted(needed & set(PACKAGES))
    for name in sorted(needed - set(PACKAGES)):
        link(name, site)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    run([*install, "--target", str(site), *(str(wheels[name]) for name in ours)])
    return Bare(python, frozenset(ours))


def example(package: str) -> str:
    """The first block of Python in a package's README."""
    text = (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert block, f"packages/{package}/README.md has no example: start one with ```python"
    return block.group(1)
