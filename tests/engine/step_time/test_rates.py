"""Rates: read from JSON, fitted to measurements, mistakes named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_engine.build.step_time.calibrate import rates_from
from ds_engine.config import load
from ds_engine.step_time import RatesError, read_rates
from ds_engine.step_time.rates import fitted, rates_of

GIVEN: dict[str, Any] = {
    "flops_per_s": 4e14,
    "memory_bytes_per_s": 2e12,
    "link": {"latency_s": 1e-5, "bytes_per_s": 5e10},
}


def rows(collective: str, latency_s: float, bytes_per_s: float) -> list[dict[str, Any]]:
    """Timings of four ranks on a link with these values, and of a slower transport."""
    return [
        {
            "collective": collective,
            "bytes": size,
            "ranks": 4,
            "seconds": slower * (2 * latency_s + size * 3 / 4 / bytes_per_s),
        }
        for size in (1024, 1 << 20, 1 << 26)
        for slower in (3.0, 1.0)
    ]


def test_short_forms_and_what_is_written_can_be_read(tmp_path: Path) -> None:
    rates = rates_of(GIVEN)
    assert rates.forward_flops_per_s == rates.backward_flops_per_s == 4e14
    assert rates.gather == rates.reduce and rates.gather.bytes_per_s == 5e10
    (tmp_path / "rates.json").write_text(rates.to_json())
    assert read_rates(tmp_path / "rates.json") == rates


def test_a_link_is_fitted_to_its_fastest_transport() -> None:
    link = fitted(rows("all_gather", 1e-4, 1e9))
    assert link["bytes_per_s"] == pytest.approx(1e9, rel=1e-6) and link["latency_s"] == pytest.approx(
        1e-4, rel=1e-6
    )
    measured = rows("all_gather", 1e-4, 1e9) + rows("reduce_scatter", 2e-4, 5e8)
    rates = rates_of({**GIVEN, "measured": measured})
    assert rates.gather.bytes_per_s == pytest.approx(1e9) and rates.reduce.latency_s == pytest.approx(2e-4)
    with pytest.raises(RatesError, match="at least two sizes"):
        rates_of({**GIVEN, "measured": measured[:2]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops": 1}, "there is no rate 'flops'"),
        ({"memory_bytes_per_s": 0}, "'memory_bytes_per_s' is 0: it must be a number above 0"),
        ({"memory_bytes_per_s": None}, "is None"),
        ({"link": 5}, "'gather' must be an object"),
        ({"link": {"latency_s": -1, "bytes_per_s": 1}}, "'gather.latency_s' is -1"),
        ({"occupies": 2}, "from 0 to 1"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({**GIVEN, **change}))
    with pytest.raises(RatesError, match=message) as error:
        read_rates(path)
    assert str(path) in str(error.value)


def test_measured_passes_are_divided_into_a_fixed_and_a_growing_part() -> None:
    one = {"forward_s": 5.0, "backward_s": 9.0, "few_forward_s": 3.0, "few_backward_s": 5.0}
    one |= {"numel": 0, "memory_bytes_per_s": 1e9, "occupies": 0.0, "samples": 4, "few_samples": 2}
    one |= {"update_s": 1.5, "update_bytes": 1e9}
    rates = rates_from([one], (8.0, 16.0), load({"train_batch_size": 4}))
    assert (rates.forward_pass_s, rates.forward_flops_per_s) == (1.0, 2.0)
    assert (rates.backward_pass_s, rates.backward_flops_per_s) == (1.0, 2.0)
    # One sample cannot be divided, and a measurement that scatters gives no negative part.
    single = rates_from([one | {"samples": 1, "few_samples": 1}], (8.0, 16.0), load({"train_batch_size": 4}))
    assert (single.forward_pass_s, single.forward_flops_per_s) == (0.0, 1.6)
    scattered = rates_from([one | {"few_forward_s": 1.0}], (8.0, 16.0), load({"train_batch_size": 4}))
    assert scattered.forward_pass_s == 0.0 and scattered.update_s == 0.5


def test_what_sharding_takes_besides_messages() -> None:
    link = {"latency_s": 0.01, "bytes_per_s": 100.0}
    one = {"forward_s": 5.0, "backward_s": 9.0, "few_forward_s": 5.0, "few_backward_s": 9.0, "samples": 4}
    one |= {
        "few_samples": 4,
        "numel": 100,
        "itemsize": 4,
        "units": 4,
        "occupies": 0.0,
        "memory_bytes_per_s": 1e9,
    }
    one |= {"update_s": 1.5, "update_bytes": 1e9, "gather": link, "reduce": link}
    # 200 bytes are gathered in 2.04 s; a quarter of it is waited for, the rest hides behind the forward.
    one |= {"sharded_forward_s": 5.0 + 0.51 + 4 * 0.25, "sharded_update_s": 0.5 + 0.5 + 0.125}
    rates = rates_from([one, one], (8.0, 16.0), load({"train_batch_size": 4}))
    assert rates.gather_unit_s == pytest.approx(0.25)
    # The update itself has half of the bytes: 0.5 s, and 0.5 s for what every update takes.
    assert (rates.update_s, rates.shared_update_s) == (0.5, pytest.approx(0.125))


def test_missing_rates_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RatesError, match="'gather' is missing"):
        rates_of({"flops_per_s": 1, "memory_bytes_per_s": 1})
    (tmp_path / "a.json").write_text("{")
    for name, message in (("a.json", "a.json"), ("b.json", "No such file")):
        with pytest.raises(RatesError, match=message):
            read_rates(tmp_path / name)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(RatesError, match="JSON object"):
        read_rates(tmp_path / "a.json")
