"""Rules of CONTRIBUTING.md that one regular expression can hold, over every text file of the repository.

python ci/checks/patterns.py [FILE ...]        without files: everything
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = frozenset({".git", "build", "dist", "runs", "__pycache__", ".hypothesis"})


@dataclass(frozen=True)
class Rule:
    """`pattern` must not occur in files whose relative path matches `files`, unless it matches `unless`."""

    name: str
    files: str
    pattern: str
    message: str
    unless: str = r"$^"


RULES = (
    Rule("jit", r"^(packages|tests)/.*\.py$", r"cpp_extension|load_inline", "nothing is built just in time"),
    Rule(
        "machine-flags",
        r"^(cpp|cmake)/.*(CMakeLists\.txt|\.cmake)$",
        r"^[^#]*-m(arch|tune|avx|fma|sse|f16c)",
        "code for a CPU target lives in a target region, not behind a flag of the whole file",
    ),
    Rule(
        "xfail-call",
        r"^tests/.*\.py$",
        r"pytest\.xfail\(",
        "an xfail inside a test hides what comes after it: use the marker with a reason",
        unless=r"^tests/harness/",  # which hands the verdict of a rank on
    ),
    Rule(
        "skip-reason",
        r"^tests/.*\.py$",
        r"mark\.(skip|xfail)\b(?!\()|mark\.(skip|xfail)\(\)",
        "a skip or an xfail says what is missing",
    ),
    Rule(
        "wall-clock",
        r"^tests/.*/?test_.*\.py$",
        r"assert\b.*\b(time\.time|perf_counter|monotonic)\(\)",
        "no test depends on wall-clock time; speed belongs into ci/bench",
    ),
    Rule("absolute-path", r".*", r"(^|[\s\"'=(])/(home|Users)/\w+/", "a path of one machine"),
    Rule(
        "leftover",
        r".*\.(py|cc|h|cu|md|toml|json)$",
        r"^(<{7}|>{7}|={7}$)|\bbreakpoint\(\)",
        "left over from merging or debugging",
    ),
    Rule(
        "wide-except",
        r"^packages/.*\.py$",
        r"except\s*:|except (Base)?Exception\s*:\s*pass",
        "nothing is swallowed: name the exception and handle it",
    ),
)


def check_text(text: str, path: str) -> Iterator[str]:
    """One message per line of `text` that breaks a rule."""
    rules = [rule for rule in RULES if re.search(rule.files, path) and not re.search(rule.unless, path)]
    for number, line in enumerate(text.splitlines(), 1):
        for rule in rules:
            if re.search(rule.pattern, line):
                yield f"{path}:{number}: [{rule.name}] {rule.message}"


def files() -> Iterator[Path]:
    """Every file that is not built, downloaded or hidden in a cache."""
    for folder, names, leaves in os.walk(ROOT):
        names[:] = sorted(
            n for n in names if n not in SKIPPED and not n.startswith(".venv") and "cache" not in n
        )
        yield from (Path(folder) / leaf for leaf in sorted(leaves))


def main(arguments: list[str]) -> int:
    """Prints what breaks a rule; 1 if there is anything."""
    found = 0
    for path in [Path(a).resolve() for a in arguments] or files():
        relative = path.relative_to(ROOT).as_posix()
        if relative in ("ci/checks/patterns.py", "tests/test_patterns.py"):
            continue  # they quote what they forbid
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for message in check_text(text, relative):
            print(message)
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
