"""`ds config`: what a file comes to, who set it, and how two files differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ds_engine.cli.main import app
from ds_engine.config import ConfigError, load
from ds_engine.config.report.diff import diff
from ds_engine.config.report.explain import explain
from ds_engine.config.report.json_schema import json_schema
from ds_engine.config.report.reference import reference
from ds_engine.config.sections.schema import default_of, every_key

FILE = """{
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": 4,
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": 1e-8}},
  "bfloat16": {
    "enabled": true},
  "zero_optimization": {"stage": 2,
    "contiguous_gradients": true, "stage3_prefetch": true},
  "aio": {"thread_count": 3}
}"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "ds_config.json"
    path.write_text(FILE)
    return str(path)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["config", *arguments])
    return result.exit_code, result.output


def test_the_elastic_batch_is_shown(tmp_path: Path, file: str) -> None:
    section = {"enabled": True, "max_train_batch_size": 100, "micro_batch_sizes": [2, 4], "version": 0.1}
    path = tmp_path / "elastic.json"
    path.write_text(json.dumps({"elasticity": section}))
    code, shown = run("elastic", str(path))
    assert (code, shown) == (0, "train_batch_size 96\nranks 1, 2, 3, 4, 6, 8, 12, 16, 24, 48\n")
    code, shown = run("elastic", str(path), "--ranks", "48")
    assert code == 0
    assert "train_micro_batch_size_per_gpu 2 on 48 ranks\ngradient_accumulation_steps 1 on 48 ranks" in shown
    code, shown = run("elastic", str(path), "-n", "7")
    assert code == 1 and "96 samples cannot be divided among 7 ranks" in shown
    path.write_text(json.dumps({"train_batch_size": 4}))
    code, shown = run("elastic", str(path))
    assert code == 1 and "elasticity.enabled is not true" in shown


@pytest.mark.filterwarnings("ignore:.*ds_config.json")
def test_every_value_has_an_origin(file: str) -> None:
    found = {s.path: s for s in explain(load(file), ranks=4)}
    assert (found["train_batch_size"].value, found["train_batch_size"].origin) == (
        16,
        "derived: train 16 = micro 4 x steps 1 x 4 ranks",
    )
    assert found["train_micro_batch_size_per_gpu"].origin == "line 3"
    assert found["optimizer.params.eps"].origin == "line 4"
    assert found["optimizer.params.lr"].origin == '"auto"'
    assert found["bf16.enabled"].origin == "line 6"
    assert found["zero_optimization.accumulation_plan"].value == "sharded"
    assert found["zero_optimization.contiguous_gradients"].note.startswith("no effect: gradients")
    assert found["zero_optimization.stage3_prefetch"].note.startswith("no effect: the stage is below 3")
    assert found["aio.thread_count"].note.startswith("ignored")
    assert found["gradient_clipping"].origin == "default"
    assert "seed" not in found
    everything = {s.path for s in explain(load(file), ranks=4, defaults=True)}
    assert {"seed", "checkpoint.keep_last", "zero_optimization.overlap_publish"} <= everything


def test_explain_and_check_on_the_command_line(file: str) -> None:
    code, said = run("explain", file, "--ranks", "4")
    assert code == 0 and "derived: train 16" in said and "warning: " in said
    code, said = run("check", file, "-n", "2")
    assert code == 0 and f"{file} is valid" in said
    assert "note: zero_optimization.contiguous_gradients has no effect" in said


@pytest.mark.parametrize(
    ("text", "arguments", "wanted"),
    [
        ('{"gradient_clip": 1}', [], 'unknown key "gradient_clip"'),
        ('{"train_batch_size": 7}', ["-n", "2"], "has no whole solution"),
        ('{"optimizer": {"type": "AdamX"}}', [], 'Did you mean "Adam'),
        ('{"optimizer": {"type": "Adam", "params": {"lrr": 1}}}', [], 'Did you mean "lr"'),
        ('{"scheduler": {"type": "WarmupLR", "params": {"warmup": 1}}}', [], "has no such argument"),
        ('{"optimizer": {"type": "LBFGS"}}', [], "are incompatible"),
    ],
)
def test_check_finds_mistakes(tmp_path: Path, text: str, arguments: list[str], wanted: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    code, said = run("check", str(path), *arguments)
    assert code == 1 and wanted in said
    assert run("check", str(tmp_path / "nothing.json"))[0] == 1


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "Adam", "params": params}}


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ({"gradient_clipping": 1.0}, {}, []),
        ({"steps_per_print": float("inf")}, {"steps_per_print": 0}, []),
        ({"fp16": {"enabled": False}, "aio": None}, {}, []),
        ({"zero_optimization": {"sub_group_size": 1e9}}, {}, []),
        (adam(betas=[0.9, 0.99]), adam(betas=(0.9, 0.99)), []),
        ({"gradient_clipping": 0.5}, {}, ["gradient_clipping"]),
        (adam(lr=1), adam(), ["optimizer.params.lr"]),
        ({"gradient_clipping": "auto"}, {}, ["gradient_clipping"]),
    ],
)  # fmt: skip
def test_differences_of_meaning(first: dict[str, Any], second: dict[str, Any], wanted: list[str]) -> None:
    found = diff(load({"train_batch_size": 8, **first}), load({"train_batch_size": 8, **second}))
    assert [d.path for d in found] == wanted


def test_batch_sizes_are_compared_as_they_come_out(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text('{"train_batch_size": 8}')
    second.write_text('{"train_micro_batch_size_per_gpu": 4}')
    assert run("diff", str(first), str(second))[0] == 1
    assert run("diff", str(first), str(second), "-n", "2") == (0, "they mean the same\n")
    with pytest.raises(ConfigError):
        diff(load(first), load(second), ranks=3)


def test_the_schema_has_every_key_and_its_references_lead_somewhere() -> None:
    schema = json_schema()
    text = json.dumps(schema)
    for key in every_key():
        assert f'"{key.name}"' in text, key.path
    assert schema["additionalProperties"] is False
    assert {"const": "auto"} in schema["properties"]["gradient_clipping"]["anyOf"]
    assert {"const": False} in schema["properties"]["fp16"]["anyOf"]
    assert schema["properties"]["wall_clock_breakdown"]["x-owner"] == "ds-engine"
    assert schema["properties"]["bfloat16"]["deprecated"]
    stack: list[Any] = [schema]
    while stack:
        here = stack.pop()
        if isinstance(here, dict):
            if isinstance(here.get("$ref"), str):
                assert here["$ref"].removeprefix("#/$defs/") in schema["$defs"]
            stack += here.values()
        elif isinstance(here, list):
            stack += here
    assert json.loads(run("schema")[1]) == schema


def test_the_reference_page_is_up_to_date() -> None:
    """`ds config schema --markdown > docs/guide/configuration-reference.md` makes it so."""
    page = Path(__file__).parents[3] / "docs/guide/configuration-reference.md"
    assert page.read_text(encoding="utf-8") == reference()
    assert run("schema", "--markdown") == (0, reference())


def test_every_key_is_described_and_on_the_page() -> None:
    """In whole sentences, with the meaning of a default that is no value."""
    page = reference()
    for key in every_key():
        text = key.info.description or ""
        assert text[:1].isupper() or text[:1] == '"', key.path
        assert text.endswith("."), key.path
        assert len(text.split()) >= 2 or key.section is not None, f"{key.path}: {text}"
        if not key.info.is_required() and default_of(key) is None:
            assert "Default: " in text, f"{key.path}: {text}"
        assert f"`{key.name}`" in page, key.path
