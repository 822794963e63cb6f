"""Every mistake in a configuration is named, with a remedy."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds_engine.config import ConfigError, DsConfig, load
from ds_engine.config.foreign import BY_SECTION, is_foreign
from ds_engine.config.load import sections

MINIMAL = {"train_batch_size": 8}
ALL_KEYS = [(section, key) for section, model in sections().items() for key in model.model_fields]


def nested(section: str, content: dict[str, Any]) -> dict[str, Any]:
    for part in reversed(section.split(".") if section else []):
        content = {part: content}
    return content


def message(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(raw)
    return str(caught.value)


def test_a_whole_config_becomes_typed_values() -> None:
    config = load(
        {
            "train_batch_size": 32,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3,
                "reduce_bucket_size": 5e8,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
            },
            "gradient_clipping": 1,
            "checkpoint": {"keep_last": 2},
        }
    )
    assert config.zero_optimization.reduce_bucket_size == 500_000_000
    assert config.zero_optimization.offload_optimizer.device == "cpu"
    assert config.bf16.enabled
    assert config.gradient_clipping == 1.0
    assert config.checkpoint.keep_last == 2
    assert load(config) is config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_defaults() -> None:
    config = load(MINIMAL)
    assert config.gradient_clipping == 1.0
    assert config.zero_optimization.stage == 0
    assert not config.bf16.enabled
    assert config.optimizer is None


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ({"gradient_clipp1ng": 1.0}, 'unknown key "gradient_clipp1ng": did you mean "gradient_clipping"?'),
        ({"zero_optimisation": {"stage": 1}}, 'did you mean "zero_optimization"?'),
        ({"zero_optimization": {"stgae": 1}}, 'did you mean "zero_optimization.stage"?'),
        ({"stage": 3}, '"stage" belongs under "zero_optimization"'),
        ({"zero_optimization": {"bf16": {}}}, '"bf16" belongs at the top level'),
        ({"optimizer": {"type": "Adam", "learning_rate": 1}}, 'unknown key "optimizer.learning_rate"'),
        ({"ofload_optimizer": {}}, 'did you mean "offload_optimizer", which belongs under '
        '"zero_optimization"?'),
        ({"xyzzy": 1}, "the top level has bf16, checkpoint,"),
        ({"zero_optimization": {"stage": 5}}, "zero_optimization.stage is 5: there are stages 0 to 3 (0: "
        "nothing is divided; 1:"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "is \"nvme\": it has to be one of "
        "'none' or 'cpu'"),
        ({"train_batch_size": "8"}, 'train_batch_size is "8": it has to be a whole number'),
        ({"train_batch_size": True}, "train_batch_size is true: it has to be a whole number"),
        ({"train_batch_size": 2.5}, "train_batch_size is 2.5: it has to be a whole number"),
        ({"train_batch_size": 0}, "train_batch_size is 0: it has to be at least 1"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1: it has to be at least 0"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is NaN"),
        ({"bf16": True}, "bf16 is true: it has to be an object {...}"),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled is "yes": it has to be true or false'),
        ({"optimizer": {"params": {}}}, '"optimizer.type" is missing'),
        ({"optimizer": {"type": 3}}, "optimizer.type is 3: it has to be a text in quotes"),
        ({"zero_optimization": {"accumulation_plan": "both"}}, "one of 'local' or 'sharded'"),
        ({"fp16": {"enabled": True}}, "\"fp16\" is a setting of DeepSpeed's that this version does not have"),
        ({"zero_optimization": {"overlap_comm": True}}, '"zero_optimization.overlap_comm" is a setting of '
        'DeepSpeed'),
    ],
)  # fmt: skip
def test_mistakes_are_explained(raw: dict[str, Any], wanted: str) -> None:
    assert wanted in message({**MINIMAL, **raw})


def test_all_mistakes_are_told_at_once() -> None:
    said = message({"train_batch_sise": 8, "zero_optimization": {"stage": 9}, "seed": "x"})
    assert "has 3 mistakes" in said
    assert all(part in said for part in ("train_batch_size", "stages 0 to 3", 'seed is "x"'))


@pytest.mark.parametrize("off", [{"enabled": False}, {}, None, False])
def test_what_is_switched_off_is_accepted(off: Any) -> None:
    assert load({**MINIMAL, "fp16": off}) == load(MINIMAL)


def test_a_misspelt_key_is_not_missing_too() -> None:
    assert message({"optimizer": {"typ": "Adam"}}) == (
        'config: unknown key "optimizer.typ": did you mean "optimizer.type"?'
    )


def test_foreign_keys_are_not_ours() -> None:
    for section, model in sections().items():
        assert not BY_SECTION.get(section, frozenset()) & set(model.model_fields), section


def test_keys_are_a_frozen_surface() -> None:
    """A new key needs documentation and a test that it does something; then it is added here."""
    assert sorted(f"{s}.{k}".strip(".") for s, k in ALL_KEYS) == [
        "bf16",
        "bf16.enabled",
        "checkpoint",
        "checkpoint.keep_last",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "optimizer.params",
        "optimizer.type",
        "scheduler",
        "scheduler.params",
        "scheduler.type",
        "seed",
        "startup_summary",
        "steps_per_print",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_optimization",
        "zero_optimization.accumulation_plan",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.overlap_publish",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.stage",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch",
    ]


def test_every_key_is_described_and_in_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs/guide/configuration.md").read_text()
    for section, model in sections().items():
        for key, field in model.model_fields.items():
            assert field.description, f"{section}.{key}"
            assert f"`{key}`" in guide, f"{section}.{key} is not in the guide"


@given(st.sampled_from(ALL_KEYS), st.data())
@settings(max_examples=300, deadline=None)
def test_one_edit_misspellings_find_the_key(place: tuple[str, str], data: st.DataObject) -> None:
    section, key = place
    letters = string.ascii_lowercase + string.digits + "_"
    at = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(letters))
    typo = data.draw(
        st.sampled_from(
            [
                key[:at] + key[at + 1 :],
                key[:at] + letter + key[at:],
                key[:at] + letter + key[at + 1 :],
                key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
                key.upper(),
            ]
        )
    )
    known = {k for _, k in ALL_KEYS}
    assume(typo not in known and typo and not is_foreign(section, typo))
    wanted = f'did you mean "{section}.{key}"?' if section else f'did you mean "{key}"?'
    assert wanted in message(nested(section, {typo: 1}))


class TestFiles:
    def write(self, folder: Path, text: str) -> Path:
        path = folder / "ds_config.json"
        path.write_text(text)
        return path

    def test_a_file_equals_its_dict(self, tmp_path: Path) -> None:
        raw = {"train_batch_size": 8, "seed": 3}
        path = self.write(tmp_path, json.dumps(raw))
        assert load(path) == load(str(path)) == load(raw) == DsConfig(train_batch_size=8, seed=3)

    def test_duplicate_keys_are_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, '{"train_batch_size": 8, "bf16": {"enabled": true, "enabled": false}}')
        assert f'{path}: key "enabled" is given twice' in message(path)

    def test_broken_json_says_where(self, tmp_path: Path) -> None:
        assert "not JSON at line 2, column 1" in message(self.write(tmp_path, '{"seed": 1,\n}'))

    def test_json_of_another_kind(self, tmp_path: Path) -> None:
        assert "holds a list" in message(self.write(tmp_path, "[1]"))

    def test_a_missing_file_names_what_is_there(self, tmp_path: Path) -> None:
        self.write(tmp_path, "{}")
        with pytest.raises(
            FileNotFoundError,
            match=r"no configuration file .*other\.json; .* has "
            r"ds_config\.json",
        ):
            load(tmp_path / "other.json")

    def test_errors_name_the_file(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, '{"sed": 1}')
        assert message(path).startswith(f"{path}: unknown key")

    def test_something_else(self) -> None:
        assert "config is a int" in message(3)
