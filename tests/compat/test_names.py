"""Every name resolves, and importing them costs little and changes nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import deepspeed
from ds_compat import refused
from ds_compat.modules import refuse_original
from ds_compat.names import MODULES


def test_every_name_of_the_table_resolves() -> None:
    for path, homes in MODULES.items():
        full = f"deepspeed.{path}" if path else "deepspeed"
        module = importlib.import_module(full)
        assert importlib.util.find_spec(full) is not None
        if isinstance(homes, str):
            assert dir(module)
            continue
        for names in homes.values():
            for entry in names.split():
                assert getattr(module, entry.partition("=")[0]) is not None or entry == "LOG_LEVEL_DEFAULT", (
                    entry
                )


def test_modules_can_be_imported_in_every_form() -> None:
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import groups, logger

    from deepspeed import zero

    assert zero.Init is deepspeed.zero.Init is deepspeed.runtime.zero.partition_parameters.Init
    assert ZeroParamStatus.NOT_AVAILABLE.value == 2
    assert lr_schedules.WARMUP_MIN_LR == "warmup_min_lr"
    assert groups._get_sequence_parallel_world_size() == 1
    assert logger.name == "DeepSpeed"
    with pytest.raises(AttributeError, match="ds-compat"):
        _ = deepspeed.no_such_name


def test_accelerators_are_found_by_their_files() -> None:
    [folder] = deepspeed.accelerator.__path__
    stems = sorted(path.stem for path in Path(folder).glob("*_accelerator.py"))
    assert {"cpu_accelerator", "cuda_accelerator", "xpu_accelerator"} <= set(stems)
    for stem in stems:
        module = importlib.import_module(f"deepspeed.accelerator.{stem}")
        [name] = [name for name in dir(module) if name.endswith("_Accelerator")]
        made = getattr(module, name)()
        assert isinstance(made, deepspeed.accelerator.DeepSpeedAccelerator)
        assert made.device_name() == stem.removesuffix("_accelerator")
    assert type(deepspeed.accelerator.get_accelerator()).__name__.endswith("_Accelerator")


def test_a_name_can_be_replaced_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformers does with a function of partition_parameters, and tests with mock.patch."""
    from deepspeed.runtime.zero import partition_parameters

    mine = object()
    monkeypatch.setattr(partition_parameters, "zero_wrapper_for_fp_tensor_constructor", mine)
    assert partition_parameters.zero_wrapper_for_fp_tensor_constructor is mine
    monkeypatch.setattr("deepspeed.comm.get_local_rank", lambda: 7)
    assert deepspeed.comm.get_local_rank() == 7


def test_what_is_not_there_says_who_owns_it() -> None:
    from deepspeed.moe.sharded_moe import TopKGate
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    assert not isinstance(object(), TrainSchedule)  # code asks, and goes on
    with pytest.raises(refused.NotThereError, match=r"use ds_pipe.make\("):
        TrainSchedule(micro_batches=4, stages=2, stage_id=0)
    with pytest.raises(NotImplementedError, match="TopKGate has other arguments here: use ds_moe"):
        TopKGate(4, 2)
    with pytest.raises(refused.NotThereError, match="ds-layers"):
        importlib.import_module("deepspeed.sequence.layer")._SeqAllToAll(None, None)


def test_metadata_answers_for_deepspeed() -> None:
    from packaging.version import Version

    assert Version(importlib.metadata.version("deepspeed")) >= Version("0.19.8")
    assert importlib.metadata.version("deepspeed") == deepspeed.__version__
    assert importlib.metadata.metadata("deepspeed")["Name"] == "deepspeed"
    assert (deepspeed.__version_major__, deepspeed.__version_minor__) == (0, 19)


def test_refuses_to_load_among_the_files_of_the_original(tmp_path) -> None:
    (tmp_path / "runtime").mkdir()
    refuse_original([str(tmp_path)])
    (tmp_path / "runtime" / "engine.py").touch()
    with pytest.raises(ImportError, match="pip uninstall deepspeed ds-compat"):
        refuse_original([str(tmp_path)])


def test_importing_starts_nothing_and_loads_little() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import deepspeed
loaded = {m.split(".")[0] for m in set(sys.modules) - before}
print(sorted(loaded - {"deepspeed", "ds_compat"} - set(sys.stdlib_module_names)), torch.distributed.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_model_parallel_units_are_refused_by_name() -> None:
    class Unit:
        def get_model_parallel_world_size(self) -> int:
            return 2

    with pytest.raises(refused.NotThereError, match="2 model-parallel ranks"):
        deepspeed.initialize(model=object(), config={}, mpu=Unit())
