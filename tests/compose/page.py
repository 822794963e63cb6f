"""docs/composition.md from the recorded outcomes. After a change: `cd tests && python -m compose.page`, and with
`DS_COMPOSE_RECORD=1 DS_TEST_FULL=1 pytest tests/compose` the outcomes are recorded anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from compose.jobs import FEATURES, pairs

OUTCOMES = Path(__file__).with_name("outcomes.json")
PAGE = Path(__file__).parents[2] / "docs" / "composition.md"

HEAD = """# What goes with what

This page is written by `tests/compose/page.py` from what the jobs of `tests/compose` did: do not edit it.

Each cell is a job on four ranks in which two features meet: a small decoder of Transformers (for pipelines a list
of layers) is trained for two steps, and its losses are those of plain PyTorch on one process, to 1e-4. Divisions
(pipeline, tensor, sequence, expert) are over two ranks, the other axis is data. "Checkpoint for other sizes" saves,
loads without tensor and sequence parallelism, with four stages or with experts over four ranks, and trains on.
`torch.compile` runs with the backend "eager". 1-bit Adam is in its first, exact phase. Pipeline, tensor and expert
parallelism together, on eight ranks, are in `tests/compose/test_three_divisions.py`.

* **yes**: trained as on one process
* **a number**: refused before training, or without effect, with the reason below

"""


def key(first: str, second: str) -> str:
    """The name of a pair in the record."""
    return f"{first} x {second}"


def recorded() -> dict[str, str]:
    """For each pair, "" if it trains, or why it is refused."""
    outcomes: dict[str, str] = json.loads(OUTCOMES.read_text())
    return outcomes


def page_of(outcomes: Mapping[str, str]) -> str:
    """The text of the page."""
    reasons: list[str] = []
    rows = []
    known = set(pairs())
    for row, second in enumerate(FEATURES):
        cells = []
        for column, first in enumerate(FEATURES):
            if column >= row or (first, second) not in known:
                cells.append("")
                continue
            reason = outcomes[key(first, second)]
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(str(reasons.index(reason) + 1) if reason else "yes")
        if any(cells):
            rows.append(f"| {second} | " + " | ".join(cells[:-1]) + " |")
    title = "| | " + " | ".join(FEATURES[:-1]) + " |"
    line = "|---" * len(FEATURES) + "|"
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return HEAD + "\n".join([title, line, *rows]) + "\n\n## Reasons\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page_of(recorded()))
