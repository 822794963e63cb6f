"""Every mistake in a configuration is named, with a remedy."""

from __future__ import annotations

import random
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_engine.config import ConfigError, load
from ds_engine.config.load.unknown import unknown
from ds_engine.config.sections.schema import Key, every_key, keys_of, sections

MINIMAL = {"train_batch_size": 8}


def nested(section: str, content: dict[str, Any]) -> dict[str, Any]:
    for part in reversed(section.split(".") if section else []):
        content = {part: content}
    return content


def message(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(raw)
    return str(caught.value)


def test_0_and_1_where_deepspeed_takes_them() -> None:
    assert (
        load({"train_batch_size": 8, "zero_allow_untested_optimizer": 1}).zero_allow_untested_optimizer
        is True
    )
    with pytest.raises(ConfigError, match="zero_allow_untested_optimizer"):
        load({"train_batch_size": 8, "zero_allow_untested_optimizer": 2})


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


def test_all_mistakes_are_told_at_once() -> None:
    said = message({"train_batch_sise": 8, "zero_optimization": {"stage": 9}, "seed": "x"})
    assert "has 3 mistakes" in said
    assert all(part in said for part in ("train_batch_size", "stages 0 to 3", 'seed is "x"'))


def test_mistakes_of_every_kind_are_told_at_once() -> None:
    """Also what excludes each other and what is not built, although other values are wrong."""
    said = message(
        {
            "train_batch_size": "8",
            "optimizer": {"type": "AdamW", "params": {"lr": "3e-4"}},
            "fp16": {"enabled": True},
            "bf16": {"enabled": True},
            "amp": {"enabled": True},
            "sed": 1,
        }
    )
    assert "has 5 mistakes" in said
    for part in ('batch_size is "8"', 'lr is "3e-4"', "exclude each other", "amp.enabled is true", '"sed"'):
        assert part in said


def test_a_wrong_value_makes_no_second_mistake_out_of_its_default() -> None:
    said = message(nested("autotuning", {"start_profile_step": "x", "end_profile_step": 1}))
    assert said == 'config: autotuning.start_profile_step is "x": it must be an integer'


FOREIGN = {
    "_comment": "for small clusters",
    "//": "a note",
    "comment": "a note",
    "comms_config": {"verbose": False},
    "cuda_visible_devices": "0",
    "wandb_project": "mine",
}


def test_keys_of_other_programs_are_refused_or_ignored_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="DeepSpeed has no such key") as caught:
        config = load({**MINIMAL, **FOREIGN}, foreign_keys=True)
    assert len(caught) == 1
    assert all(f'"{name}"' in str(caught[0].message) for name in FOREIGN)
    assert config == load(MINIMAL) and set(config.origin.ignored) == set(FOREIGN)
    for name, value in FOREIGN.items():
        assert f'unknown key "{name}"' in message({**MINIMAL, name: value})


def test_a_misspelt_key_is_refused_among_foreign_ones() -> None:
    for name in ("train_batchsize", "gradient_clip", "zero_optimisation", "tensorboards"):
        with pytest.raises(ConfigError, match=f'unknown key "{name}": did you mean'):
            load({**MINIMAL, **FOREIGN, name: 1}, foreign_keys=True)


def test_keys_with_dots_and_keys_of_sections_are_told_where_they_belong() -> None:
    raw = {**MINIMAL, "zero_optimization.reduce_bucket_size": 0.9, "stage": 2}
    with pytest.warns(UserWarning, match="DeepSpeed has no such key") as caught:
        config = load(raw, foreign_keys=True)
    said = str(caught[0].message)
    assert 'write "reduce_bucket_size" inside of the section "zero_optimization"' in said
    assert '"stage" belongs under "zero_optimization"' in said
    assert config.zero_optimization.stage == 0 and config.zero_optimization.reduce_bucket_size is None


def test_a_hundred_thousand_unknown_keys_are_twenty_sentences_and_a_number() -> None:
    many = {f"name{i}": i for i in range(100_000)}
    with pytest.raises(ConfigError) as caught:
        load(many)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "and 99,980 more unknown keys"
    with pytest.warns(UserWarning, match="and 99,980 more") as warned:
        load({**MINIMAL, **many}, foreign_keys=True)
    assert len(warned) == 1 and len(str(warned[0].message)) < 1000


def test_an_optimizer_without_a_type_is_none() -> None:
    for section in ("optimizer", "scheduler"):
        assert load({**MINIMAL, section: {"type": None, "params": {"lr": 1e-3}}}) == load(MINIMAL)


def test_the_address_of_a_schema_is_no_setting() -> None:
    assert load({**MINIMAL, "$schema": "./ds_config.schema.json"}) == load(MINIMAL)


def test_numbers_that_are_too_large_are_refused() -> None:
    assert "train_batch_size is an integer of 16610 bits: it must be" in message(
        {"train_batch_size": 10**5000}
    )
    assert "lr is an integer of" in message(
        {**MINIMAL, "optimizer": {"type": "SGD", "params": {"lr": 10**5000}}}
    )


@pytest.mark.parametrize("off", [{"enabled": False}, {}, None, False])
@pytest.mark.parametrize("section", ["comms_logger", "tensorboard", "amp"])
def test_what_is_switched_off_is_accepted(section: str, off: Any) -> None:
    assert load({**MINIMAL, section: off}) == load(MINIMAL)


def test_a_misspelt_key_is_not_missing_too() -> None:
    assert message({"optimizer": {"typ": "Adam"}}) == (
        'config: unknown key "optimizer.typ": did you mean "optimizer.type"?'
    )


def test_a_misspelling_under_a_name_of_the_user_shows_that_name() -> None:
    said = message(
        nested(
            "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.length",
            {"min_dificulty": 1},
        )
    )
    assert (
        "curriculum_metrics.length.min_dificulty" in said
        and "curriculum_metrics.length.min_difficulty" in said
    )


def test_numbers_of_other_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    raw = {"train_batch_size": numpy.int64(8), "gradient_clipping": numpy.float32(0.5)}
    config = load(raw)
    assert (config.train_batch_size, config.gradient_clipping) == (8, 0.5)


def test_what_accelerate_writes_for_print_nothing() -> None:
    assert load({**MINIMAL, "steps_per_print": float("inf")}).steps_per_print == 0


def misspellings(name: str) -> list[str]:
    """Every text that is one edit away from `name`: a letter lost, doubled, typed wrong, or two swapped."""
    letters = string.ascii_lowercase + string.digits + "_"
    found = [name[:i] + name[i + 1 :] for i in range(len(name))]
    found += [name[:i] + letter + name[i:] for i in range(len(name) + 1) for letter in letters]
    found += [name[:i] + letter + name[i + 1 :] for i in range(len(name)) for letter in letters]
    found += [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)]
    return found


def section_of(key: Key) -> str:
    return key.path.rpartition(".")[0]


def found_first(key: Key, typo: str) -> bool:
    return f'did you mean "{key.path}"?' in unknown(section_of(key), typo)


def test_one_edit_misspellings_of_every_key_find_it_first() -> None:
    """Five of each key's, drawn at random; 95% have to be right, and in truth nearly all are."""
    draw = random.Random(0)
    tried, wrong = 0, []
    for key in every_key():
        siblings = keys_of(sections()[section_of(key)], section_of(key))
        typos = [t for t in misspellings(key.name) if t and t not in siblings]
        for typo in draw.sample(typos, 5):
            tried += 1
            if not found_first(key, typo):
                wrong.append(f"{key.path}: {typo}")
    assert len(wrong) <= 0.02 * tried, wrong


@given(st.sampled_from([key for key in every_key() if "*" not in key.path]), st.data())
@settings(max_examples=100, deadline=None)
def test_a_misspelling_is_refused_wherever_it_stands(key: Key, data: st.DataObject) -> None:
    siblings = keys_of(sections()[section_of(key)], section_of(key))
    typo = data.draw(st.sampled_from([t for t in misspellings(key.name) if t and t not in siblings]))
    if key.name.upper() not in siblings and data.draw(st.booleans()):
        typo = key.name.upper()
    section = section_of(key)
    assert f'unknown key "{section}.{typo}"'.replace('".', '"') in message(nested(section, {typo: 1}))
