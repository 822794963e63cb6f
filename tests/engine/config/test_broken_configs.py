"""Broken configurations and what is said about each: broken_configs.jsonl, one a line.

`config` is the configuration (beside a batch size), or a text where the text itself is broken; `says` is a
sentence of the error. A sentence that is to change is changed there, by hand.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ds_engine.config import ConfigError, load

ROWS = [
    json.loads(line) for line in (Path(__file__).parent / "broken_configs.jsonl").read_text().splitlines()
]


def test_there_are_enough_of_each_kind() -> None:
    kinds = Counter(row["kind"] for row in ROWS)
    assert sum(kinds.values()) >= 200
    assert min(kinds.values()) >= 8, kinds


@pytest.mark.filterwarnings("ignore::UserWarning")  # old names among them
@pytest.mark.parametrize("row", ROWS, ids=[f"{i}-{row['kind']}" for i, row in enumerate(ROWS)])
def test_it_is_refused_with_a_reason(row: dict[str, Any]) -> None:
    raw = row["config"]
    with pytest.raises(ConfigError) as caught:
        load({"train_batch_size": 8, **raw} if isinstance(raw, dict) else raw)
    said = [text.partition(": ")[2] if text.startswith("line ") else text for text in caught.value.problems]
    assert row["says"] in said
