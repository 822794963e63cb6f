"""A configuration is the same from a file, a dict, a text or base64, and says where its values stand."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_engine.config import ConfigError, DsConfig, load, read
from ds_engine.config.load.reader import ReadError, parse

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

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "ds_config.json"
    path.write_text(text, encoding="utf-8")
    return path


def message(raw: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(raw)  # type: ignore[arg-type]
    return str(caught.value)


@given(st.dictionaries(st.text(), JSON, max_size=4), st.sampled_from([None, 2]), st.booleans())
def test_all_of_json_is_read_as_json(value: dict[str, object], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parse(text).value == json.loads(text)


def test_infinity_is_read_as_python_writes_it() -> None:
    assert parse(json.dumps({"a": float("inf"), "b": -float("inf")})).value == {
        "a": float("inf"),
        "b": -float("inf"),
    }


def test_what_people_write() -> None:
    document = parse(HUMAN)
    assert document.value == {
        "train_batch_size": 8,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": 2},
    }
    assert document.lines["train_batch_size"] == 4
    assert document.lines["optimizer.params.lr"] == 9


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "a: 1\nb: two words\nc: '''\n  three\n  lines\n'''",
            {"a": 1, "b": "two words", "c": "three\nlines"},
        ),
        ('{"a": "x # no comment // here"}', {"a": "x # no comment // here"}),
        ("{a: 5 apples}".replace("}", "\n}"), {"a": "5 apples"}),
        ("{a: -1.5e-3 # small\n b: [1 2\n 3]}".replace("1 2", "1, 2"), {"a": -1.5e-3, "b": [1, 2, 3]}),
        ("\ufeff{}", {}),
        ('{"a": "\\ud83d\\ude00\\u00e9\\n"}', {"a": "\U0001f600é\n"}),
    ],
)
def test_forms(text: str, wanted: object) -> None:
    assert parse(text).value == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a": 1\n "b" 2}', 'line 2, column 6: after the key "b" a colon is missing'),
        ('{"a": 1 "b": 2}', "line 1, column 9: a comma or } is missing"),
        ('{"a": [1, 2}', "line 1, column 12: a comma or ] is missing"),
        (" # empty", "there is nothing"),
        ('{"a": {"b": 1}', "the object that begins on line 1 is not closed"),
        ('{"a": [1,', "the list that begins on line 1 is not closed"),
        ('{"a": "x}', "the text is not closed on its line"),
        ('{"a": "\\x"}', "is no escape"),
        ('{"a": "\\u12"}', "four hexadecimal digits"),
        ("{a: AdamW, b: 1}", "put a text in quotation marks"),
        ("{a: }", "is not a value"),
        ("/* for ever", "the comment is not closed"),
        ("{} {}", "something follows after the end"),
        ("{,}", "a key is missing before ','"),
        ('{a: """x"""}', "is missing"),
        ("{a: '''x}", "triple quotes is not closed"),
    ],
)
def test_broken_texts_say_where(text: str, wanted: str) -> None:
    with pytest.raises(ReadError) as caught:
        parse(text)
    assert wanted in str(caught.value)


@given(st.text(alphabet="{}[]:,\"'a1 \n#/*\\.-", max_size=40))
def test_no_text_breaks_the_reader(text: str) -> None:
    with contextlib.suppress(ReadError):
        parse(text)


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
    assert "not JSON at line 2, column 3: a key is missing" in message(write(tmp_path, '{"seed": 1,\n  ]}'))


def test_json_of_another_kind(tmp_path: Path) -> None:
    assert "holds a list" in message(write(tmp_path, "[1]"))


def test_no_text_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not a text in UTF-8" in message(path)


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
        "  2. line 4: bf16.enabled is 3: it has to be true or false"
    )


def test_something_else() -> None:
    assert "config is a int" in message(3)
