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


@pytest.mark.parametrize("off", [{"enabled": False}, {}, None, False])
@pytest.mark.parametrize("section", ["flops_profiler", "tensorboard", "amp"])
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
