"""JSON as people write it is read, and what is broken is located."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_engine.config.load.reader import MAX_DEPTH, ReadError, parse

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
        (" # empty", "the file is empty"),
        ('{"a": {"b": 1}', "the object that begins on line 1 is not closed"),
        ('{"a": [1,', "the list that begins on line 1 is not closed"),
        ('{"a": "x}', "the string is not closed on its line"),
        ('{"a": "\\x"}', "is not an escape"),
        ('{"a": "\\u12"}', "four hexadecimal digits"),
        ("{a: AdamW, b: 1}", "put a string in quotation marks"),
        ("{a: }", "is not a value"),
        ("/* for ever", "the comment is not closed"),
        ("{} {}", "there is text after the end"),
        ("{,}", "a key is missing before ','"),
        ('{a: """x"""}', "is missing"),
        ("{a: '''x}", "triple quotes is not closed"),
        (
            '{"a":' * 900 + "1" + "}" * 900,
            "line 1, column 501: objects and lists are nested more than 100 levels deep",
        ),
        ("[" * 900 + "]" * 900, "nested more than 100 levels deep"),
        ('{"a": 1' + "0" * 5000 + "}", "line 1, column 7: a number of 5001 digits"),
        ('{"lr": 1e999}', "line 1, column 8: 1e999 is larger than the largest number"),
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


def test_what_is_not_too_deep_is_read() -> None:
    value = parse("[" * MAX_DEPTH + "]" * MAX_DEPTH).value
    for _ in range(MAX_DEPTH - 1):
        (value,) = value
    assert value == []


def test_lines_are_counted_over_comments_and_texts() -> None:
    text = "{\n/* one\n two */ a: 1\n\n# three\n b: '''x\ny'''\n c: 2}"
    assert parse(text).lines == {"a": 3, "b": 6, "c": 8}
