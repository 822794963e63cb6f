"""train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks, or an error that
shows it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_engine.config import ConfigError
from ds_engine.config.support.batch import Batch, resolve

small = st.integers(1, 64)
maybe = st.none() | small


@pytest.mark.parametrize(
    ("given_sizes", "wanted"),
    [
        ((32, 4, 4, 2), (32, 4, 4)),
        ((32, 4, None, 2), (32, 4, 4)),
        ((32, None, 4, 2), (32, 4, 4)),
        ((32, None, None, 2), (32, 16, 1)),
        ((None, 4, 4, 2), (32, 4, 4)),
        ((None, 4, None, 2), (8, 4, 1)),
    ],
)
def test_what_is_left_out_is_computed(
    given_sizes: tuple[int | None, ...], wanted: tuple[int, int, int]
) -> None:
    found = resolve(*given_sizes)  # type: ignore[arg-type]
    assert (found.train, found.micro, found.steps) == wanted


@given(maybe, maybe, maybe, st.integers(1, 8))
def test_the_equation_holds_or_the_error_offers_settings_that_work(
    train: int | None, micro: int | None, steps: int | None, ranks: int
) -> None:
    try:
        found = resolve(train, micro, steps, ranks)
    except ConfigError as error:
        text = str(error)
        if train is None:
            assert "set train_batch_size or train_micro_batch_size_per_gpu" in text
            return
        assert str(train) in text and f"ranks {ranks}" in text
        offered = text.split("Nearest settings that work: " if "Nearest" in text else "Change one of them: ")[
            1
        ]
        settings = 0
        for option in re.split("; or ", offered):
            values = {
                "train_batch_size": train,
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": steps,
            }
            changes = {k: int(v) for k, v in re.findall(r"(\w+) (\d+)", option) if k in values}
            if changes:
                settings += 1
                resolve(*(values | changes).values(), ranks)  # raises if it does not work after all
        assert settings
        return
    assert found.train == found.micro * found.steps * found.ranks
    for asked, got in ((train, found.train), (micro, found.micro), (steps, found.steps)):
        assert asked in (None, got)


def test_contradiction_shows_the_equation() -> None:
    with pytest.raises(
        ConfigError,
        match="train_batch_size 32 is not train_micro_batch_size_per_gpu 4 x gradient_accumulation_steps 2 x "
        "ranks 2 = 16",
    ):
        resolve(32, 4, 2, 2)


def test_a_batch_is_a_value() -> None:
    assert resolve(8, None, None, 2) == Batch(train=8, micro=4, steps=1, ranks=2)
