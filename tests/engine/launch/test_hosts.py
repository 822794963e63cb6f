"""Host files, and what --include and --exclude leave of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_engine.launch.hosts import Pool, fetch_hostfile, parse_hostfile, parse_resource_filter, read_env_files

HOSTS: Pool = {"worker-0": [0, 1], "worker-1": [0, 1, 2]}


def test_a_host_file(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# ours\nworker-0 slots=2\n\nworker-1   slots=3  # large\n")
    assert fetch_hostfile(str(file)) == HOSTS
    assert fetch_hostfile(str(tmp_path / "none")) is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["worker-0 slots=two"], "bad entry: worker-0 slots=two"),
        (["worker-0"], "bad entry"),
        (["a slots=1", "a slots=2"], "multiple entries for a"),
        (["# nothing"], "empty or not formatted"),
    ],
)
def test_lines_that_are_none(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_hostfile(lines)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("", "", HOSTS),
        ("worker-1", "", {"worker-1": [0, 1, 2]}),
        ("worker-1:2,0,2@worker-0:1", "", {"worker-0": [1], "worker-1": [0, 2]}),
        ("worker-1:2@worker-1:0", "", {"worker-1": [0, 2]}),
        ("", "worker-0", {"worker-1": [0, 1, 2]}),
        ("", "worker-1:0,1@worker-0:0", {"worker-0": [1], "worker-1": [2]}),
    ],
)
def test_what_is_left(include: str, exclude: str, expected: Pool) -> None:
    found = parse_resource_filter(HOSTS, include, exclude)
    assert found == expected and list(found) == [host for host in HOSTS if host in expected]


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        ("worker-0", "worker-1", "mutually exclusive"),
        ("worker-2", "", "'worker-2' not found"),
        ("", "worker-0:2", "No slot '2' specified on host 'worker-0'"),
    ],
)
def test_what_there_is_not(include: str, exclude: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_resource_filter(HOSTS, include, exclude)


def test_files_of_variables_that_no_environment_can_hold_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / ".deepspeed_env"
    for text, said in (
        (b"A=1\nB=\0\n", "line 2"),
        (b"=1\n", "line 1"),
        (b"A=\xff\n", "is not text in UTF-8"),
    ):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=said) as caught:
            read_env_files(file.name)
        assert str(file) in str(caught.value)
    file.write_text("# B=2\nA=x=y\n\n")
    assert read_env_files(file.name) == {"A": "x=y"}
