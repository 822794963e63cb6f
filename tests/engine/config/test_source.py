"""A configuration is the same from a file, a dict, a text or base64, and says where its values stand."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from ds_engine.config import ConfigError, DsConfig, load, read

HUMAN = """
# how people write it
{
  train_batch_size: 8,          // samples
  "bf16": {"enabled": true,},   /* a trailing
                                   comma */
  optimizer: {
    type: AdamW
    params: {'lr': 1e-3, "betas": [0.9, 0.95,]}
  }
  "zero_optimization": {"stage": 2}
}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "ds_config.json"
    path.write_text(text, encoding="utf-8")
    return path


def message(raw: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(raw)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_file_equals_its_dict(tmp_path: Path) -> None:
    raw = {"train_batch_size": 8, "seed": 3}
    text = json.dumps(raw)
    path = write(tmp_path, text)
    code = base64.urlsafe_b64encode(text.encode()).decode()
    assert load(path) == load(str(path)) == load(raw) == load(text) == load(code)
    assert load(raw) == DsConfig(train_batch_size=8, seed=3)
    assert read(path) == raw


def test_people_s_file_is_a_config(tmp_path: Path) -> None:
    config = load(write(tmp_path, HUMAN))
    assert config.zero_optimization.stage == 2 and config.optimizer is not None
    assert config.origin.line("zero_optimization.stage") == 11


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, '{"train_batch_size": 8,\n "bf16": {"enabled": true,\n "enabled": false}}')
    assert f'{path}: key "enabled" is given twice in one section, on lines 2 and 3' in message(path)


def test_broken_json_says_where(tmp_path: Path) -> None:
    assert "not valid JSON: line 2, column 3: a key is missing" in message(
        write(tmp_path, '{"seed": 1,\n  ]}')
    )


def test_a_dict_that_holds_itself_is_refused() -> None:
    raw: dict[str, object] = {"train_batch_size": 8}
    raw["optimizer"] = raw
    assert message(raw) == "config: objects and lists are nested more than 100 levels deep"


def test_json_of_another_kind(tmp_path: Path) -> None:
    assert "contains a list" in message(write(tmp_path, "[1]"))


def test_no_text_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in message(path)


def test_a_missing_file_names_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    with pytest.raises(
        FileNotFoundError, match=r"no configuration file .*other\.json; .* has ds_config\.json"
    ):
        load(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError):
        load(str(tmp_path))


def test_errors_name_the_file_and_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"train_batch_size": 1,\n"sed": 1,\n "bf16": {\n"enabled": 3}}')
    assert message(path) == (
        f"{path} has 2 mistakes:\n"
        '  1. line 2: unknown key "sed": did you mean "seed"?\n'
        "  2. line 4: bf16.enabled is 3: it must be true or false"
    )


def test_something_else() -> None:
    assert "config is a int" in message(3)
