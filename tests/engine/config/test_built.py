"""Every key does something, or says that it does not: no key is ignored in silence."""

from __future__ import annotations

import ast
import typing
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from ds_engine.build import zero as zero_section
from ds_engine.build.topology import arranged
from ds_engine.config import ConfigError, load
from ds_engine.config.built import BUILT, State, effectless, row_of
from ds_engine.config.built.row import Row
from ds_engine.config.built.table import refusals, switches
from ds_engine.config.sections.schema import ANY, Key, by_path, default_of, every_key
from ds_engine.job import choices_of, describe

TESTS = Path(__file__).parents[2]


def file_named(name: str) -> Path | None:
    """The test file of that name in the tests of ds_engine, wherever it lies, or by its path below tests/."""
    direct = (TESTS / "engine" / name, TESTS / name)
    return next(
        (file for file in (*direct, *(TESTS / "engine").rglob(Path(name).name)) if file.is_file()), None
    )


# Key that works, or section -> a test that fails when it is ignored.
TESTED = {
    "expert_parallel": "build/test_expert_section.py::test_losses_are_those_of_one_process",
    "expert_parallel.all_to_all_bits": "build/test_expert_section.py::test_encoded_tokens_train_nearly_as_well",
    "autotuning.enabled": "training/test_trial.py::test_without_a_metric_path_or_turned_off_training_goes_on",
    "autotuning.metric_path": "training/test_trial.py::test_it_ends_after_the_measured_steps_with_the_result",
    "autotuning.start_profile_step": "training/test_trial.py::test_it_ends_after_the_measured_steps_with_the_result",
    "autotuning.end_profile_step": "training/test_trial.py::test_it_ends_after_the_measured_steps_with_the_result",
    "autotuning.overwrite": "tune/test_script.py::test_results_that_exist_are_used_again_without_overwrite",
    "autotuning.arg_mappings": "tune/test_script.py::test_arguments_that_repeat_a_setting_follow_it",
    "autotuning.fast": "tune/test_script.py::test_run_trains_with_the_answer",
    "autotuning.results_dir": "tune/test_script.py::test_the_folders_are_those_of_the_section",
    "autotuning.exps_dir": "tune/test_script.py::test_the_folders_are_those_of_the_section",
    "autotuning.tuner_num_trials": "build/tuning/test_tuner.py::test_limits_of_the_section_autotuning_count",
    "autotuning.max_train_micro_batch_size_per_gpu": "build/tuning/test_tuner.py::"
    "test_limits_of_the_section_autotuning_count",
    "autotuning.min_train_micro_batch_size_per_gpu": "build/tuning/test_tuner.py::"
    "test_limits_of_the_section_autotuning_count",
    "autotuning.max_train_batch_size": "build/tuning/test_tuner.py::test_limits_of_the_section_autotuning_count",
    "autotuning.min_train_batch_size": "build/tuning/test_tuner.py::test_limits_of_the_section_autotuning_count",
    "pipeline.stages": "pipeline/test_engine.py::test_mistakes_are_errors_on_all_ranks",
    "pipeline.activation_checkpoint_interval": "pipeline/test_engine.py::test_mistakes_are_errors_on_all_ranks",
    "pipeline.schedule": "pipeline/test_engine.py::test_mistakes_are_errors_on_all_ranks",
    "pipeline.receive_ahead": "pipeline/test_engine.py::test_mistakes_are_errors_on_all_ranks",
    "pipeline.max_unsharded": "pipeline/test_engine.py::test_mistakes_are_errors_on_all_ranks",
    "pipeline.timeout_s": "pipeline/test_engine.py::test_mistakes_are_errors_on_all_ranks",
    "integrity.replica_check_interval": "test_integrity.py::"
    "test_a_flipped_bit_in_a_value_that_stays_is_found_at_the_next_check",
    "integrity.message_checksums": "test_integrity.py::test_a_bit_flipped_on_the_way_is_found_at_once",
    "integrity.checksums": "test_integrity.py::test_checksums_find_a_flipped_bit_of_a_shard",
    "stall_reports": "build/test_stalls.py::test_a_rank_that_comes_late_is_reported_with_parameter_and_line",
    "local_sgd": "build/test_local_sgd.py::test_the_engine_trains_like_a_plain_loop",
    "sparse_gradients": "training/test_accumulation.py::test_sparse_gradients_send_less_and_train_the_same",
    "zero_optimization.leaf_module.classes": "test_settings_reach.py::test_leaf_modules_by_class_name_and_suffix",
    "zero_optimization.leaf_module.names": "test_settings_reach.py::test_leaf_modules_by_class_name_and_suffix",
    "zero_optimization.leaf_module.name_suffixes": "test_settings_reach.py::test_leaf_modules_by_class_name_and_suffix",
    "train_batch_size": "test_batch.py::test_what_is_left_out_is_computed",
    "train_micro_batch_size_per_gpu": "test_batch.py::test_what_is_left_out_is_computed",
    "gradient_accumulation_steps": "test_batch.py::test_what_is_left_out_is_computed",
    "optimizer.type": "build/test_optimizer.py::test_other_names",
    "optimizer.params": "build/test_optimizer.py::test_adam_is_our_kernel_with_decoupled_decay",
    "scheduler.type": "schedules/test_schedules.py::test_schedules_of_torch_by_name",
    "scheduler.params": "schedules/test_schedules.py::test_warmup_linear",
    "fp16.enabled": "test_fp16.py::test_fp16_trains_alike_at_every_stage",
    "fp16.auto_cast": "job/test_precision.py::test_fp16_casts_inputs_only_where_it_is_asked_to",
    "fp16.loss_scale": "job/test_precision.py::test_what_guards_a_step",
    "fp16.initial_scale_power": "job/test_precision.py::test_what_guards_a_step",
    "fp16.loss_scale_window": "job/test_precision.py::test_what_guards_a_step",
    "fp16.hysteresis": "job/test_precision.py::test_what_guards_a_step",
    "fp16.consecutive_hysteresis": "job/test_precision.py::test_what_guards_a_step",
    "fp16.min_loss_scale": "job/test_precision.py::test_what_guards_a_step",
    "bf16.enabled": "job/test_precision.py::test_bf16_casts_floating_tensors_wherever_they_are",
    "bf16.check_grad_overflow": "test_fp16.py::test_bf16_without_the_check_takes_every_step",
    "bf16.bf16_optimizer_states": "test_fp16.py::test_bf16_states_take_half_the_memory",
    "torch_autocast.enabled": "test_fp16.py::test_autocast_equals_a_plain_loop_bit_by_bit",
    "torch_autocast.dtype": "job/test_precision.py::test_what_guards_a_step",
    "torch_autocast.lower_precision_safe_modules": "test_fp16.py::test_autocast_equals_a_plain_loop_bit_by_bit",
    "data_types.grad_accum_dtype": "test_fp16.py::test_gradients_are_summed_in_the_dtype_asked_for",
    "data_types.param_dtype": "job/test_precision.py::test_what_excludes_each_other_is_refused",
    "data_types.buffer_dtype": "job/test_precision.py::test_buffers_take_their_dtypes",
    "data_types.keep_in_fp32_modules": "job/test_precision.py::test_buffers_take_their_dtypes",
    "gradient_clipping": "test_engine.py",
    "steps_per_print": "test_engine.py",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "compat/engine/test_engine.py::test_whole_weights",
    "zero_optimization.zero_quantized_weights": "build/test_comm.py::"
    "test_weights_and_gradients_are_sent_in_few_bits_and_training_follows",
    "zero_optimization.zero_quantized_gradients": "build/test_comm.py::"
    "test_gradients_are_quantised_at_stage_2_where_weights_are_not",
    "zero_optimization.zero_quantized_nontrainable_weights": "build/test_comm.py::"
    "test_frozen_parameters_are_kept_and_gathered_in_8_bits",
    "zero_optimization.zeropp_loco_param.err_beta": "build/test_comm.py::"
    "test_both_keys_of_the_error_feedback_arrive",
    "zero_optimization.zeropp_loco_param.reset_T": "build/test_comm.py::"
    "test_both_keys_of_the_error_feedback_arrive",
    "zero_optimization.mics_shard_size": "test_settings_reach.py::test_groups_of_ranks_that_hold_replicas",
    "dump_state": "test_built.py::test_dump_state_prints_every_setting",
    "vocabulary_size": "test_built.py::test_a_vocabulary_that_tensor_cores_do_not_like",
    "elasticity": "test_elastic.py::test_the_config_takes_its_batch_sizes_from_the_section",
    "sparse_attention": "build/layers/test_attention.py::"
    "test_a_pattern_of_the_section_becomes_the_attention_of_the_model",
    "sequence_parallel_size": "build/test_sequence.py::test_two_by_two_ranks_train_as_one_process",
    "data_parallel_size": "test_built.py::test_data_parallel_size_is_the_number_of_ranks",
    "dataloader_drop_last": "test_unexpected_use.py::test_training_data_of_less_than_a_micro_batch_is_refused",
    "checkpoint.keep_last": "build/test_checkpoint.py",
    "checkpoint.writer.decoupled": "checkpoint/write/test_background.py",
    "checkpoint.memory_copies.interval": "build/test_memory_copies.py::"
    "test_the_state_is_copied_every_few_steps_and_resumed",
    "checkpoint.memory_copies.copies": "build/test_memory_copies.py::test_the_number_of_copies",
    "activation_offload.device": "test_activation_offload.py::test_activations_are_moved",
    "activation_offload.nvme_path": "test_activation_offload.py::test_activations_are_moved",
    "activation_offload.min_bytes": "test_activation_offload.py::test_small_tensors_stay_by_default",
    "activation_offload.layers": "test_activation_offload.py::test_only_layers_that_are_named_are_moved",
    "activation_offload.budget_bytes": "test_activation_offload.py::test_a_budget_keeps_the_last_ones",
    "activation_offload.prefetch_bytes": "test_activation_offload.py::"
    "test_nothing_is_read_ahead_if_no_bytes_are_allowed",
    "activation_offload.max_host_bytes": "test_activation_offload.py::test_host_memory_is_limited",
    "activation_checkpointing": "test_engine.py::test_activation_checkpointing_follows_the_configuration",
    "flops_profiler": "build/test_profiler.py::test_the_profiled_step_has_the_work_of_its_formula_at_every_stage",
    "links": "build/test_links.py::test_what_loses_is_named_with_both_durations",
    "comms_logger": "build/test_comms_log.py::test_the_bytes_of_training_are_recorded_and_nothing_else_changes",
    "comms_logger.prof_all": "build/test_comms_log.py::test_prof_ops_selects_and_a_one_bit_optimizer_is_seen",
    "comms_logger.prof_ops": "build/test_comms_log.py::test_prof_ops_selects_and_a_one_bit_optimizer_is_seen",
    "comms_logger.debug": "build/test_comms_log.py::test_prof_ops_selects_and_a_one_bit_optimizer_is_seen",
    "comms_logger.verbose": "../comm/log/test_comms_log.py::test_verbose_and_debug_name_time_and_caller",
    "wall_clock_breakdown": "training/test_timing.py::test_the_engine_measures_its_parts_and_writes_curves",
    "memory_breakdown": "training/test_timing.py::test_memory_is_written_after_each_part",
    "tensorboard": "training/test_monitor.py::test_tensorboard",
    "csv_monitor": "training/test_monitor.py::test_csv_has_a_file_for_each_name_and_goes_on_in_it",
    "wandb": "training/test_monitor.py::test_wandb",
    "comet": "training/test_monitor.py::test_comet_writes_every_so_many_samples",
    "seed": "test_engine.py",
    "startup_summary": "training/test_startup_summary.py::test_it_is_printed_once_and_can_be_silenced",
    "zero_optimization.stage": "test_built.py::test_a_key_reaches_ds_zero",
    "zero_optimization.offload_optimizer.device": "test_built.py::test_offload_chooses_where_states_rest",
    "zero_optimization.offload_optimizer.nvme_path": "build/test_offload.py::test_the_settings_reach_the_store",
    "zero_optimization.offload_optimizer.buffer_count": "build/test_offload.py::test_the_settings_reach_the_store",
    "zero_optimization.offload_optimizer.ratio": "build/test_offload.py::"
    "test_fractions_reach_store_plan_and_buckets",
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "build/test_offload.py::"
    "test_a_share_of_the_cores_is_left_to_the_optimizer",
    "zero_optimization.offload_optimizer.overlap_step": "test_built.py::test_a_key_reaches_ds_zero",
    "zero_optimization.offload_optimizer.undo_bytes": "test_built.py::test_a_key_reaches_ds_zero",
    "zero_optimization.offload_param.max_in_cpu": "build/test_offload.py::"
    "test_fractions_reach_store_plan_and_buckets",
    "zero_optimization.offload_param.device": "test_built.py::test_offload_chooses_where_states_rest",
    "zero_optimization.offload_param.nvme_path": "build/test_offload.py::test_the_settings_reach_the_store",
    "offload.budget": "build/test_budget.py::test_every_tier_has_the_bytes_of_the_plan",
    "offload": "build/test_budget.py::test_rates_change_the_placement",
    "aio": "build/test_offload.py::test_the_settings_reach_the_store",
    "zero_optimization.offload_optimizer.pin_memory": "build/test_offload.py::test_pin_memory_reaches_the_stores",
    "zero_optimization.offload_param.pin_memory": "build/test_offload.py::test_pin_memory_reaches_the_stores",
}


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {part: value}
    return typing.cast("dict[str, Any]", value)


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if both else value
    return found


def config_with(path: str, value: Any, stage: int = 3) -> dict[str, Any]:
    """A configuration in which the key is set, and whatever it needs to be allowed."""
    needed = {"zero_optimization": {"stage": stage}} if path.startswith("zero_optimization.") else {}
    if path.startswith(("optimizer.", "scheduler.")):
        needed = {path.partition(".")[0]: {"type": "Adam" if path.startswith("optimizer") else "WarmupLR"}}
    return merged({"train_batch_size": 8}, needed, nested(path, value))


def candidates(annotation: Any) -> list[Any]:
    """Values of a type, likely ones first."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return list(arguments)
    if origin is list:
        return [["z3"], [2], ["x"], []]
    if origin is dict:
        return [{"x": 1}]
    if arguments:  # a union, or annotated
        return [value for option in arguments for value in candidates(option)]
    if annotation is type(None):
        return [None]
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return [{}]
    return {bool: [True, False], int: [2, 3], float: [0.5, 2.0], str: ["x"]}.get(annotation, ["x"])


def values_of(key: Key) -> list[Any]:
    return candidates(key.info.annotation)


def rows(*states: State) -> list[Row]:
    return [row for row in BUILT.values() if row.state in states]


def leaves() -> list[Key]:
    """Keys that hold a value, not a section."""
    return [key for key in every_key() if key.section is None]


def test_every_key_has_a_row_and_every_row_a_key() -> None:
    assert [key.path for key in leaves() if row_of(key.path) is None] == []
    assert [path for path in BUILT if path not in by_path()] == []
    for row in BUILT.values():
        assert row.owner.startswith("ds-") and row.why


@pytest.mark.parametrize(
    ("row", "path"),
    [(row, path) for row in rows(State.LATER, State.GONE) for path in switches(row)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_there_is_refused_by_name_and_accepted_while_it_is_off(row: Row, path: str) -> None:
    quiet = switches(row)[path]
    loud = [v for v in values_of(by_path()[path]) if not any(v == q and type(v) is type(q) for q in quiet)]
    assert loud, f"no value of {path} asks for anything"
    refused = 0
    for value in loud:
        try:
            load(config_with(path, value))
        except ConfigError as error:
            told = [
                p
                for p in error.problems
                if p.startswith(f"{path} is ") and (row.owner in p or "ds does not" in p)
            ]
            refused += bool(told)
            for text in told:
                assert row.why in text and "; " in text
    assert refused, f"{path} is accepted with {loud}"
    for value in quiet:
        if value is None and by_path()[path].section is None and None not in values_of(by_path()[path]):
            continue  # its section is missing
        load(config_with(path, value))


@pytest.mark.parametrize(
    "key", [k for k in leaves() if (r := row_of(k.path)) and r.state is State.NO_EFFECT], ids=lambda k: k.path
)
def test_what_has_no_effect_is_accepted_and_told(key: Key) -> None:
    value = default_of(key)
    values = [value, *values_of(key)] if value is not None else values_of(key)
    told = 0
    for option in values:
        try:
            config = load(config_with(key.path, option))
        except ConfigError:
            continue  # not a value of this key
        told += 1
        assert effectless(config)[key.path]
    assert told


def test_a_factor_beside_prescaling_has_no_effect() -> None:
    factor = {"train_batch_size": 8, "gradient_predivide_factor": 2.0}
    assert "gradient_predivide_factor" not in effectless(load(factor))
    assert (
        "prescale_gradients is true"
        in effectless(load({**factor, "prescale_gradients": True}))["gradient_predivide_factor"]
    )


def test_offload_param_asks_for_nothing_below_stage_3() -> None:
    for stage in (0, 1, 2):
        config = load(config_with("zero_optimization.offload_param.device", "nvme", stage))
        assert "the stage is below 3" in effectless(config)["zero_optimization.offload_param.device"]
    load(config_with("zero_optimization.offload_param", {"device": "nvme", "nvme_path": "/x"}, 3))


EXPECTS_MORE = (
    "zero_optimization.offload",
    "activation_offload.",
    "offload.",
    "aio.",
    "zero_optimization.zeropp_loco",
)
"""Keys that need another key besides a stage."""


def test_what_has_no_effect_at_this_stage_is_told() -> None:
    for row in rows(State.WORKS):
        if row.only is None or row.key == "gradient_predivide_factor":
            continue
        if "elasticity" in row.otherwise or row.key.startswith("expert_parallel."):  # they ask for no stage
            continue
        key = by_path()[row.key]
        value = next(v for v in values_of(key) if v is not None)
        found = [effectless(load(config_with(row.key, value, stage))) for stage in (0, 1, 2, 3)]
        assert any(row.key in idle for idle in found), row.key
        if not row.key.startswith(EXPECTS_MORE):
            assert not all(row.key in idle for idle in found), row.key


def test_every_key_that_works_has_a_test() -> None:
    for key in leaves():
        row = row_of(key.path)
        assert row is not None
        # test_a_key_reaches_ds_zero has those of ZeroConfig
        if row.state is not State.WORKS or row.why.startswith("ZeroConfig.") or ANY in key.path:
            continue
        top = key.path.partition(".")[0]
        test = TESTED.get(key.path) or TESTED.get(top)
        if test is None:
            # What reads it, says the table: its tests have to name the key, or the section.
            module = row.why.removeprefix("ds_engine.")
            file = file_named(f"test_{module.replace('.', '_')}.py") or file_named(
                f"test_{module.rpartition('.')[2]}.py"
            )
            assert file is not None, f"{key.path} works, says the table: which test fails when it is ignored?"
            text = file.read_text(encoding="utf-8")
            assert key.name in text or top in text, f"{file} does not try {key.path}"
            continue
        wanted, _, name = test.partition("::")
        file = file_named(wanted)
        assert file is not None, test
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name in names, test


@pytest.mark.parametrize(
    "row", [r for r in rows(State.WORKS) if r.why.startswith("ZeroConfig.")], ids=lambda r: r.key
)
def test_a_key_reaches_ds_zero(row: Row) -> None:
    field = row.why.removeprefix("ZeroConfig.")
    seen = set()
    for stage in (1, 3):
        for value in [default_of(by_path()[row.key]), *values_of(by_path()[row.key])]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    config = load(config_with(row.key, value, stage))
                except ConfigError:
                    continue
            job = describe(choices_of(config), arranged(config, 0, 2), "cpu")
            made = zero_section.zero_config(job, torch.nn.Linear(1, 1))
            seen.add(str(getattr(made, field)))
    assert len(seen) > 1, f"{row.key} does not change ZeroConfig.{field}"


def test_offload_chooses_where_states_rest() -> None:
    def placement(device: str, param: str = "none", stage: int = 3) -> Any:
        step = {"device": device, "nvme_path": "/x"}
        section = {"offload_optimizer": step, "offload_param": {"device": param, "nvme_path": "/y"}}
        return choices_of(load(config_with("zero_optimization", {"stage": stage, **section}))).placement

    assert placement("none").on("device") == {"param", "grad", "master", "state"}
    assert not placement("none").optimizer_on_host
    assert placement("cpu").on("cpu") == {"grad", "master", "state"} and placement("cpu").optimizer_on_host
    assert placement("nvme", "cpu").on("nvme") == {"grad", "master", "state"}
    assert placement("nvme", "cpu").on("cpu") == {"param"} and placement("nvme").optimizer_on_host
    assert placement("none", "nvme").on("nvme") == {"param"}
    assert placement("none", "nvme", 2).on("device") == {"param", "grad", "master", "state"}


def test_a_vocabulary_that_tensor_cores_do_not_like() -> None:
    with pytest.warns(UserWarning, match="50257: tensor cores work on multiples of 8 rows, so 50264"):
        load({"train_batch_size": 8, "vocabulary_size": 50257})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load({"train_batch_size": 8, "vocabulary_size": 50264})


def test_data_parallel_size_is_the_number_of_ranks() -> None:
    config = load({"train_batch_size": 8, "data_parallel_size": 2})
    assert config.batch(2).micro == 4
    with pytest.raises(ConfigError, match="data_parallel_size is 2, and there are 4 data-parallel ranks"):
        config.batch(4)


def test_dump_state_prints_every_setting(capfd: pytest.CaptureFixture[str]) -> None:
    import torch.distributed as dist

    from engine import jobs

    try:
        jobs.engine(dump_state=True)
        said = capfd.readouterr().err
        assert "gradient_accumulation_steps" in said and "derived: train 16" in said
        jobs.engine()
        assert capfd.readouterr().err == ""
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("name", ["super_offload", "zenflow"])
def test_what_deepspeed_calls_otherwise_is_the_exact_overlapped_step(name: str) -> None:
    offload = {"device": "cpu"} | ({"super_offload": True} if name == "super_offload" else {})
    section = {"stage": 2, "offload_optimizer": offload} | ({"zenflow": {}} if name == "zenflow" else {})
    settings = load({"train_batch_size": 8, "bf16": {"enabled": True}, "zero_optimization": section})
    job = describe(choices_of(settings), arranged(settings, 0, 1), "cpu")
    assert zero_section.zero_config(job, torch.nn.Linear(2, 2)).overlap_step


def test_a_configuration_that_uses_no_extra_package_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """ds-engine installs without them: no default of a key may ask for one."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    settings = load({"train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}})
    assert not list(refusals(settings))
    with pytest.raises(ConfigError, match="needs ds-layers, which is not installed"):
        load({"train_batch_size": 1, "sequence_parallel_size": 2})
