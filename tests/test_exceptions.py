"""Exceptions of every package reach another process as themselves.

Pools, Ray and Lightning carry them by pickling; one that cannot be rebuilt hangs its parent.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tuple(
    sorted(
        path.parent.name
        for path in ROOT.glob("packages/*/src/*/__init__.py")
        if path.parent.name != "deepspeed"
    )
)
REFUSED = {"train_batch_size": 1, "zero_optimization": {"stage": 9, "stag": 1}}


def ds_engine_config() -> None:
    import ds_engine

    ds_engine.initialize(model=torch.nn.Linear(2, 2), config=REFUSED)


def deepspeed_config() -> None:
    import deepspeed

    deepspeed.initialize(model=torch.nn.Linear(2, 2), config=REFUSED)


def elastic_base() -> None:
    from deepspeed.elasticity import compute_elastic_config

    compute_elastic_config({"elasticity": {"enabled": True}}, "0.2")


def elastic_config() -> None:
    from deepspeed.elasticity import compute_elastic_config

    compute_elastic_config({})


def elastic_ranks() -> None:
    import ds_engine

    section = {"enabled": True, "max_train_batch_size": 100, "micro_batch_sizes": [2, 4], "version": 0.1}
    ds_engine.config.load({"elasticity": section}).batch(7)


def unusable_hosts() -> None:
    from ds_engine.launch.restart import UnusableHostsError

    raise UnusableHostsError("host-b cannot be reached", ["host-b"])


# Where each class with a constructor of its own is really raised; the others are built from a message.
RAISED: dict[str, Callable[[], None]] = {
    "ConfigError": ds_engine_config,
    "DeepSpeedConfigError": deepspeed_config,
    "ElasticityError": elastic_base,
    "UnusableHostsError": unusable_hosts,
    "ElasticityConfigError": elastic_config,
    "ElasticityIncompatibleWorldSize": elastic_ranks,
}


def exception_classes() -> Iterator[type[BaseException]]:
    """Every exception class that a module of our packages defines, once each."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            continue  # only nvcc builds ds_core_cu13
        module = importlib.import_module(package)
        for info in pkgutil.walk_packages(module.__path__, f"{package}."):
            if not info.name.endswith("__main__") and ".libds_" not in info.name:
                importlib.import_module(info.name)
    waiting: list[type[BaseException]] = [BaseException]
    seen: set[type[BaseException]] = set()
    while waiting:
        cls = waiting.pop()
        if cls in seen:
            continue
        seen.add(cls)
        waiting += cls.__subclasses__()
        if cls.__module__.split(".")[0] in PACKAGES:
            yield cls


def instance(cls: type[BaseException]) -> BaseException:
    """An instance as users meet it."""
    provoke = RAISED.get(cls.__name__)
    if provoke is None:
        own = [
            base.__name__
            for base in cls.__mro__
            if "__init__" in vars(base) and base.__module__ != "builtins"
        ]
        assert not own, f"{cls.__qualname__} has a constructor of its own: say in RAISED how it comes about"
        return cls("what is wrong, and the remedy")
    with pytest.raises(cls) as raised:
        provoke()
    assert type(raised.value) is cls
    return raised.value


def assert_same(rebuilt: BaseException, error: BaseException) -> None:
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert rebuilt.args == error.args
    assert vars(rebuilt) == vars(error)


def test_every_exception_class_survives_pickling() -> None:
    names = []
    for cls in exception_classes():
        error = instance(cls)
        error.rank = 3  # type: ignore[attr-defined]  # what a framework notes on it
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert_same(pickle.loads(pickle.dumps(error, protocol)), error)
        assert_same(copy.copy(error), error)
        names.append(cls.__name__)
    # The walk finds what is known to be there.
    assert {"ConfigError", "DeepSpeedConfigError", "CheckpointError", "RankOrderError", "StartError"} <= set(
        names
    )
    assert set(RAISED) <= set(names)


def test_the_problems_of_a_configuration_arrive_one_by_one() -> None:
    error = instance(importlib.import_module("ds_engine").ConfigError)
    assert len(error.problems) == 2  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(error)).problems == error.problems  # type: ignore[attr-defined]
