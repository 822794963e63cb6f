"""The sign of life: on a terminal only, and only where something takes long."""

from __future__ import annotations

import io
import sys

import pytest

from ds_engine.cli.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, delay_s: float) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with waiting("planning stage 2", delay_s=delay_s) as now:
        now("planning stage 3")
    return stream.getvalue()


def test_it_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "planning stage" in shown(monkeypatch, Terminal(), 0.0)


def test_what_is_over_soon_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "planning" not in shown(monkeypatch, Terminal(), 3600.0)


def test_files_and_pipes_get_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, io.StringIO(), 0.0) == ""


def test_an_error_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="inside"), waiting("planning", delay_s=0.0):
        raise ValueError("inside")
