"""Parses JSON with comments, trailing commas, and keys without quotation marks.

It accepts all of JSON. Of Hjson (https://hjson.github.io) it accepts comments (`#`, `//`, `/* */`), keys without
quotes, a missing comma at the end of a line, single quotes, strings in triple quotes, a string without quotes up to
the end of its line, and a file without the outermost braces. A key that is given twice is an error: other JSON
readers silently use the last value.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "NaN": float("nan")} | {
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}
_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'"}
_RUN = {quote: re.compile(rf"[^{quote}\\\n]*") for quote in "\"'"}
"""Quote -> pattern of the text up to that quote, an escape or the end of the line."""
_SPACE = re.compile(r"\s*")
_SPACE_ON_LINE = re.compile(r"[^\S\n]*")
_HEAD = re.compile(r"(?:(?!#|//|/\*)[^,\]}\s])*")
"""Pattern of a value without quotes, up to a comma, a bracket, white space or a comment."""
_AFTER_A_NUMBER = ("", "\n", *',]}#/"')
_BARE_KEY = re.compile(r"[^\s{}\[\],:#\"']+")


MAX_DEPTH = 100
"""Maximum depth of nested objects and lists. The deepest section has four levels."""
MAX_DIGITS = 400
"""Maximum number of digits of a number; the largest float has 309."""


class ReadError(Exception):
    """The text cannot be parsed. The message contains line and column."""


@dataclass(frozen=True)
class Document:
    """A value, and the lines of its keys."""

    value: Any
    lines: dict[str, int]
    """Dotted path -> line, from 1."""


def parse(text: str) -> Document:
    """Parses a text.

    Raises:
        ReadError: with line and column.
    """
    return _Reader(text.removeprefix("\ufeff")).document()


class _Reader:
    """A recursive descent over one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.lines: dict[str, int] = {}
        self.ends = [match.start() for match in re.finditer("\n", text)]

    def document(self) -> Document:
        self.space()
        if not self.peek():
            self.fail("the file is empty")
        start = self.at
        if self.peek() in "{[" or not self.starts_with_key():
            value = self.value("")
        else:
            self.at = start
            value = self.members("", closing="")
        self.space()
        if self.at < len(self.text):
            self.fail("there is text after the end of the configuration")
        return Document(value, self.lines)

    def starts_with_key(self) -> bool:
        """Whether the file has no outermost braces."""
        start = self.at
        try:
            self.key()
            self.space()
            return self.peek() == ":"
        except ReadError:
            return False
        finally:
            self.at = start

    def value(self, path: str) -> Any:
        sign = self.peek()
        if sign and sign in "{[":
            if self.depth == MAX_DEPTH:
                self.fail(f"objects and lists are nested more than {MAX_DEPTH} levels deep")
            self.at += 1
            self.depth += 1
            inner = self.members(path, closing="}") if sign == "{" else self.items(path)
            self.depth -= 1
            return inner
        if sign and sign in "\"'":
            return self.string()
        return self.bare()

    def members(self, path: str, closing: str) -> dict[str, Any]:
        members: dict[str, Any] = {}
        opened = self.line()
        while True:
            self.space()
            if self.peek() == closing:  # both are empty at the end of a file without braces
                self.at += len(closing)
                return members
            if not self.peek():
                self.fail(f"the object that begins on line {opened} is not closed")
            self.member(path, members)
            self.comma(closing)

    def member(self, path: str, members: dict[str, Any]) -> None:
        line = self.line()
        key = self.key()
        where = f"{path}.{key}" if path else key
        if key in members:
            before = self.lines[where]
            lines = f"lines {before} and {line}" if before != line else f"line {line}"
            self.fail(
                f'key "{key}" is given twice in one section, on {lines}: keep one of them', located=False
            )
        self.space()
        if self.peek() != ":":
            self.fail(f'after the key "{key}" a colon is missing')
        self.at += 1
        self.space()
        self.lines[where] = line
        members[key] = self.value(where)

    def items(self, path: str) -> list[Any]:
        items: list[Any] = []
        opened = self.line()
        while True:
            self.space()
            if self.peek() == "]":
                self.at += 1
                return items
            if not self.peek():
                self.fail(f"the list that begins on line {opened} is not closed")
            items.append(self.value(f"{path}[{len(items)}]"))
            self.comma("]")

    def comma(self, closing: str) -> None:
        """Reads a comma, the end of the line, or the closing bracket."""
        line = self.line()
        self.space()
        if self.peek() == ",":
            self.at += 1
        elif self.peek() not in (closing, "") and self.line() == line:
            self.fail(f"a comma or {closing} is missing" if closing else "a comma is missing")

    def key(self) -> str:
        if self.peek() in ('"', "'"):
            return self.string()
        match = _BARE_KEY.match(self.text, self.at)
        if match is None:
            self.fail(f"a key is missing before {self.peek()!r}")
        self.at = match.end()
        return match.group()

    def bare(self) -> Any:
        """Reads a number, a word, or a string without quotes up to the end of its line."""
        word = _HEAD.match(self.text, self.at)
        assert word is not None  # it may be empty
        head = word.group()
        if head in _WORDS or _NUMBER.fullmatch(head):
            space = _SPACE_ON_LINE.match(self.text, word.end())
            assert space is not None  # it may be empty
            if self.text[space.end() : space.end() + 1] in _AFTER_A_NUMBER:
                number = self.word(head)
                self.at += len(head)
                return number
        end = self.text.find("\n", self.at)
        rest = self.text[self.at : end if end >= 0 else len(self.text)]
        text = re.split(r"\s#|\s//|\s/\*", rest, maxsplit=1)[0].rstrip()
        if not text or text[0] in "{}[],:" or text[-1] in ",]}" or '"' in text:
            self.fail(
                f"{(text or self.peek() or 'the end')!r} is not a value: put a string in quotation marks"
            )
        self.at += len(text)
        return text

    def word(self, head: str) -> Any:
        """Reads a number, or one of the words true, false and null."""
        if head in _WORDS:
            return _WORDS[head]
        if len(head) > MAX_DIGITS:
            self.fail(f"a number of {len(head)} digits; at most {MAX_DIGITS} are allowed")
        value = _number(head)
        if isinstance(value, float) and math.isinf(value):
            self.fail(f"{head} is larger than the largest number (1.8e308)")
        return value

    def string(self) -> str:
        if self.text.startswith("'''", self.at):
            end = self.text.find("'''", self.at + 3)
            if end < 0:
                self.fail("the string in triple quotes is not closed")
            inner = self.text[self.at + 3 : end]
            self.at = end + 3
            return "\n".join(line.strip() for line in inner.strip("\n").splitlines()).strip()
        quote, start = self.peek(), self.at
        self.at += 1
        parts: list[str] = []
        while True:
            run = _RUN[quote].match(self.text, self.at)
            assert run is not None  # it may be empty
            parts.append(run.group())
            self.at = run.end()
            sign = self.peek()
            if sign == quote:
                break
            if sign != "\\":
                self.at = start
                self.fail("the string is not closed on its line")
            parts.append(self.escape())
            self.at += 1
        self.at += 1
        return "".join(parts)

    def escape(self) -> str:
        """Reads an escape sequence, and stops at its last character."""
        self.at += 1
        sign = self.peek()
        if sign == "u":
            # A pair of surrogates is one character; Python's reader joins them.
            match = re.compile(r"u[0-9a-fA-F]{4}(?:\\u[dD][c-fC-F][0-9a-fA-F]{2})?").match(self.text, self.at)
            if match is None:
                self.fail("\\u needs four hexadecimal digits")
            code = match.group()
            if len(code) > 5 and code[1:3].lower() not in ("d8", "d9", "da", "db"):
                code = code[:5]
            self.at += len(code) - 1
            return str(json.loads(f'"\\{code}"'))
        if sign not in _ESCAPES:
            self.fail(f"\\{sign} is not an escape sequence: write \\\\ for a backslash")
        return _ESCAPES[sign]

    def space(self) -> None:
        """Skips white space and comments."""
        while True:
            space = _SPACE.match(self.text, self.at)
            assert space is not None  # it may be empty
            self.at = space.end()
            if self.text.startswith("/*", self.at):
                end = self.text.find("*/", self.at)
                if end < 0:
                    self.fail("the comment is not closed")
                self.at = end + 2
            elif self.peek() == "#" or self.text.startswith("//", self.at):
                end = self.text.find("\n", self.at)
                self.at = end if end >= 0 else len(self.text)
            else:
                return

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def line(self) -> int:
        return bisect.bisect_left(self.ends, self.at) + 1

    def fail(self, message: str, located: bool = True) -> NoReturn:
        column = self.at - self.text.rfind("\n", 0, self.at)
        raise ReadError(f"line {self.line()}, column {column}: {message}" if located else message)


def _number(text: str) -> int | float:
    return float(text) if any(sign in text for sign in ".eE") else int(text)
