"""What runs the pages does run them: each kind of block is executed, and what a page gets wrong is told."""

from __future__ import annotations

import pytest

from docs import running
from docs.blocks import blocks, num_ranks

PAGE = """
<!-- hidden
x = 20
-->
<!-- ranks: 2 -->

```python
x += 1
print("x is", x)
```

<!-- output -->
```text
x is ...
```

* a list
  <!-- file: made.py -->
  ```python
  print("made")
  ```

```sh
python made.py
```
<!-- output -->
```text
made
```
<!-- not run: nothing to see -->
```python
raise RuntimeError
```
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("DS_WRITE_OUTPUTS", raising=False)

    def run_text(text):
        (tmp_path / "page.md").write_text(text)
        return running.run_page("page.md", tmp_path / "work")

    return run_text


def test_a_page_is_read_from_top_to_bottom():
    page = blocks(PAGE)
    assert [block.language for block in page] == [
        "python",
        "python",
        "text",
        "python",
        "sh",
        "text",
        "python",
    ]
    assert PAGE.splitlines()[page[1].line - 1] == "x += 1"
    assert page[3].code == 'print("made")\n'
    assert page[3].directives == {"file": "made.py"}
    assert num_ranks(page[1:]) == 2


def test_each_kind_of_block_runs(run):
    assert run(PAGE) == "x is 21\nmade\n"


@pytest.mark.parametrize(
    "text, error",
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```sh\nexit 3\n```\n", AssertionError),
        ("<!-- exit: 3 -->\n```sh\nexit 4\n```\n", AssertionError),
        ("```sh\nds config check missing.json\n```\n", AssertionError),
        ("```sh\nno-such-command | cat\n```\n", AssertionError),
        ('```json\n{"zero_optimization": {"stag": 1}}\n```\n', ValueError),
        ("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n", AssertionError),
    ],
)
def test_what_is_wrong_is_told(run, text, error):
    with pytest.raises(error):
        run(text)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- exit: 3 -->\n```sh\nexit 3\n```\n",
        "<!-- exit: 1 -->\n```sh\nds config check missing.json  # a remark\n```\n",
        "```sh\nds config schema > schema.json\ncat schema.json\n```\n",
        '```json\n"zero_optimization": {"stage": 1}\n```\n',
        "<!-- not run: a reason -->\n```python\n1 / 0\n```\n<!-- output -->\n```text\nanything\n```\n",
    ],
)
def test_what_is_right_passes(run, text):
    run(text)
