"""`deepspeed.elasticity` under DeepSpeed's names, and the command ds_elastic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.elasticity import (
    compute_elastic_config,
    elasticity_enabled,
    ensure_immutable_elastic_config,
)
from deepspeed.elasticity.config import (
    ElasticityConfigError,
    ElasticityError,
    ElasticityIncompatibleWorldSize,
)
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from ds_compat.launch import elastic

SECTION: dict[str, Any] = {
    "enabled": True,
    "max_train_batch_size": 100,
    "micro_batch_sizes": [2, 4],
    "version": 0.1,
}


def of(**more: Any) -> dict[str, Any]:
    return {"elasticity": {**SECTION, **more}}


def test_version_01() -> None:
    suited = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert compute_elastic_config(of()) == (96, suited)
    assert compute_elastic_config(of(version="0.1"), "0.19.8", world_size=48) == (96, suited, 2)
    with pytest.raises(ElasticityIncompatibleWorldSize, match="among 7 ranks"):
        compute_elastic_config(of(), "0.19.8", world_size=7)


def test_the_number_of_ranks_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for section, micro in ((of(version=0.2), False), (of(), True)):
        with pytest.raises(ElasticityConfigError, match="WORLD_SIZE"):
            compute_elastic_config(section, return_microbatch=micro)
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert compute_elastic_config(of(version=0.2)) == (98, [7])
    assert compute_elastic_config(of(version=0.2), return_microbatch=True) == (98, [7], 2)


def test_model_parallel_ranks_share_samples() -> None:
    section = of(version=0.2, num_gpus_per_node=4, model_parallel_size=2)
    train, ranks, micro = compute_elastic_config(section, world_size=12)
    assert train <= 100 and 6 in ranks and train % (6 * micro) == 0
    assert all(number % 2 == 0 for number in ranks)  # whole machines: two data-parallel ranks on each
    with pytest.raises(ElasticityIncompatibleWorldSize, match=r"groups of elasticity\.model_parallel_size 2"):
        compute_elastic_config(section, world_size=5)


@pytest.mark.parametrize(
    ("config", "version", "says"),
    [
        ({}, None, 'section "elasticity" is missing'),
        (of(enabled=False), None, "elasticity.enabled is not true"),
        (of(max_train_batch_size=0), None, "it must be at least 1"),
        (of(micro_batch_sizes=5), None, "must be a list"),
        (of(version="new"), None, "elasticity.version"),
        (of(max_batch=1), None, 'unknown key "elasticity.max_batch"'),
        (of(), "0.2", "DeepSpeed 0.2 has no elastic batch sizes"),
        (of(min_gpus=60, max_gpus=70), None, "60 to 70 ranks"),
    ],
)
def test_mistakes(config: dict[str, Any], version: str | None, says: str) -> None:
    with pytest.raises(ElasticityError, match=says):
        compute_elastic_config(config, version)


def test_only_a_dict_is_read() -> None:
    with pytest.raises(ValueError, match="ds_config is a str"):
        compute_elastic_config("ds_config.json", "0.19.8")  # type: ignore[arg-type]
    assert (
        elasticity_enabled(of()) and not elasticity_enabled({}) and not elasticity_enabled(of(enabled=False))
    )


def test_the_scheduler_has_the_same_section(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("DEEPSPEED_ELASTICITY_CONFIG", raising=False)
    ensure_immutable_elastic_config(SECTION)
    assert DeepSpeedConfig(of()).train_batch_size == 96
    monkeypatch.setenv("DEEPSPEED_ELASTICITY_CONFIG", json.dumps({**SECTION, "min_gpus": 1}))
    ensure_immutable_elastic_config(SECTION)
    for other in ({"max_train_batch_size": 27}, {"micro_batch_sizes": [4]}, {"version": 0.2}):
        monkeypatch.setenv("DEEPSPEED_ELASTICITY_CONFIG", json.dumps({**SECTION, **other}))
        (key,) = other
        with pytest.raises(ElasticityConfigError, match=f"{key} is .* in DEEPSPEED_ELASTICITY_CONFIG"):
            DeepSpeedConfig(of())
    monkeypatch.setenv("DEEPSPEED_ELASTICITY_CONFIG", "max: 27")
    with pytest.raises(ElasticityConfigError, match="is not JSON"):
        ensure_immutable_elastic_config(SECTION)


def test_batch_sizes_beside_the_section() -> None:
    with pytest.raises(ElasticityConfigError, match="train_batch_size contradict"):
        DeepSpeedConfig({**of(), "train_batch_size": 2})
    config = DeepSpeedConfig({**of(ignore_non_elastic_batch_info=True), "train_batch_size": 2})
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (96, 4)
    assert config.gradient_accumulation_steps == 24
    with pytest.raises(DeepSpeedConfigError):
        DeepSpeedConfig({**of(), "zero_optimization": {"stage": 7}})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(of()))
    elastic.main(["-c", str(file), "-w", "48"])
    shown = capsys.readouterr().out
    assert "final_batch_size ... 96" in shown and "micro_batch_size ... 2" in shown and "48]" in shown
    with pytest.raises(SystemExit, match="among 7 ranks"):
        elastic.main(["-c", str(file), "-w", "7"])
    with pytest.raises(SystemExit, match=r"missing\.json"):
        elastic.main(["-c", str(tmp_path / "missing.json")])
