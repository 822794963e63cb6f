"""`deepspeed --autotuning run|tune SCRIPT`: tunes a training script that reads a ds_config.json.

Each trial runs the script itself with a changed copy of its configuration. The engine ends it after the measured steps
(`ds_engine.training.trial`). Nothing is known of the model before the first trial, which says how many parameters it
has and how much memory it took; from that the others are predicted roughly, and corrected as in [Note: search by
corrected predictions].
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_engine.files import write_whole
from ds_engine.tune.candidates import Candidate, Space, candidates
from ds_engine.tune.process import OUT_OF_MEMORY, run_quietly
from ds_engine.tune.search import Outcome, Prediction, Search, Tuned

if TYPE_CHECKING:
    from ds_engine.config import DsConfig

_FLAGS = ("--deepspeed_config", "--deepspeed", "--ds_config", "--config")
_FIXED = 0.3
"""Assumed part of a step that does not grow with the micro-batch; trials correct it."""
_STATE_BYTES = 16
"""Gradients, fp32 masters and two states of Adam, for each parameter."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """A training script and how it is started."""

    name: str
    arguments: tuple[str, ...]
    ranks: int
    module: bool = False

    def config_path(self) -> str:
        """The configuration file among the arguments.

        Raises:
            ValueError: there is none.
        """
        for flag in _FLAGS:
            for number, argument in enumerate(self.arguments):
                value = argument.partition("=")[2] if argument.startswith(f"{flag}=") else ""
                if argument == flag and number + 1 < len(self.arguments):
                    value = self.arguments[number + 1]
                if value and Path(value).is_file():
                    return value
        raise ValueError(
            f"autotuning changes the configuration file of the script: pass it as {' or '.join(_FLAGS)} FILE"
        )

    def command(self, config: Path, mapped: Mapping[str, str]) -> list[str]:
        """The command that runs the script with another configuration file.

        Args:
            mapped: argument of the script -> its value for this trial.
        """
        path = self.config_path()
        arguments = [
            str(config) if argument == path else argument.replace(f"={path}", f"={config}")
            for argument in self.arguments
        ]
        for name, value in mapped.items():
            if name in arguments[:-1]:
                arguments[arguments.index(name) + 1] = value
            else:
                kept = [argument for argument in arguments if not argument.startswith(f"{name}=")]
                arguments = [*kept, name, value]
        module = ["-m"] if self.module else []
        return [
            sys.executable,
            "-m",
            "ds_engine",
            "run",
            "-n",
            str(self.ranks),
            *module,
            self.name,
            *arguments,
        ]


def tune_script(
    mode: str,
    name: str,
    arguments: Sequence[str],
    machines: Mapping[str, Sequence[int]],
    say: Callable[[str], None],
) -> int:
    """As `autotune`, for a script that a launcher would start.

    Args:
        name: a file, or else the name of a module.
        machines: name of each machine -> its slots.

    Raises:
        ValueError: there are several machines, or as `autotune`.
    """
    if len(machines) > 1:
        raise ValueError(
            f"autotuning runs its trials on one machine, and there are {len(machines)}: choose one with --include"
        )
    ranks = sum(len(slots) for slots in machines.values())
    module = not Path(name).is_file()
    return autotune(mode, Script(name=name, arguments=tuple(arguments), ranks=ranks, module=module), say)


def autotune(mode: str, script: Script, say: Callable[[str], None], *, timeout_s: float = 1800.0) -> int:
    """Searches, writes the result, and with mode "run" trains with the best configuration.

    Returns:
        The exit code: that of the training with mode "run"; otherwise 0, or 1 without an answer.

    Raises:
        ValueError: the script has no configuration file, or nothing can be tried.
    """
    from ds_engine.config import load  # a launcher that does not tune has no use for it

    path = script.config_path()
    base: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    # "auto" is filled in by an integration when the script runs.
    plain = {
        key: value
        for key, value in base.items()
        if key not in ("train_batch_size", "gradient_accumulation_steps")
    }
    settings = load(plain | {"train_micro_batch_size_per_gpu": 1})
    tuner = _Tuner(script=script, base=base, settings=settings, say=say, timeout_s=timeout_s)
    tuned = tuner.run()
    say(tuned.reason)
    results = Path(settings.autotuning.results_dir)
    if tuned.best is None:
        return 1
    config = tuned.best.candidate.config(base)
    results.mkdir(parents=True, exist_ok=True)
    best = results / "ds_config_optimal.json"
    write_whole(best, (json.dumps(config, indent=2) + "\n").encode())
    why = [f"{one.candidate}: {_text(one)}" for one in tuned.outcomes]
    summary = {"best": str(tuned.best.candidate), "trials": why, "reason": tuned.reason}
    write_whole(results / "autotuning.json", (json.dumps(summary, indent=1) + "\n").encode())
    say(f"{tuned.best.candidate} is the fastest: {best}")
    if mode == "run":
        return subprocess.run(
            script.command(best, tuner.mapped(tuned.best.candidate)), check=False
        ).returncode
    return 0


@dataclass(kw_only=True)
class _Tuner:
    script: Script
    base: Mapping[str, Any]
    settings: DsConfig
    say: Callable[[str], None]
    timeout_s: float
    _told: dict[str, Any] | None = None
    """What the first trial has said of the model."""

    def run(self) -> Tuned:
        section = self.settings.autotuning
        allowed = section.tuner_num_trials if "tuner_num_trials" in section.model_fields_set else 8
        first, others = self._candidates()
        outcome = self._trial(first)
        if self._told is None:
            return Tuned(best=None, outcomes=(outcome,), reason=f"the first trial failed: {outcome.reason}")
        search = Search([self._predicted(one) for one in others], [outcome])
        return search.run(self._trial, trials=allowed)

    def _candidates(self) -> tuple[Candidate, list[Candidate]]:
        section, stage = self.settings.autotuning, self.settings.zero_optimization.stage
        batch, steps = self.base.get("train_batch_size"), self.base.get("gradient_accumulation_steps")
        only_sizes = section.fast and "fast" in section.model_fields_set
        space = Space(
            ranks=self.script.ranks,
            train_batch=batch if isinstance(batch, int) else None,
            steps=steps if isinstance(steps, int) else 1,
            stages=(stage,) if only_sizes else (0, 1, 2, 3),
            min_micro=section.min_train_micro_batch_size_per_gpu,
            max_micro=section.max_train_micro_batch_size_per_gpu,
            min_train=section.min_train_batch_size,
            max_train=section.max_train_batch_size,
        )
        made = candidates(space)
        same = [one for one in made if one.stage == stage] or made
        return min(same, key=lambda one: one.micro), made

    def _predicted(self, candidate: Candidate) -> Prediction:
        assert self._told is not None
        told, ran = self._told, self._told["ran"]
        shards = self.script.ranks
        owned = {0: 1.0, 1: 0.25 + 0.75 / shards, 2: 1 / shards, 3: 1 / shards}
        states = told["params_numel"] * _STATE_BYTES
        of_sample = (
            max(0.0, told["memory_bytes"] - states * owned[ran["stage"]])
            / ran["train_micro_batch_size_per_gpu"]
        )
        memory = int(states * owned[candidate.stage] + candidate.micro * of_sample)
        grown = candidate.micro / ran["train_micro_batch_size_per_gpu"]
        step_s = told["latency"] / ran["gradient_accumulation_steps"] * (_FIXED + (1 - _FIXED) * grown)
        samples = candidate.micro * self.script.ranks
        return Prediction(
            candidate=candidate,
            samples_per_s=samples / step_s,
            memory_bytes=memory,
            # The estimate is rough, so only what is far too large is left out; the others may run out of memory.
            fits=memory <= 1.5 * (told["free_bytes"] + told["memory_bytes"]),
        )

    def mapped(self, candidate: Candidate) -> dict[str, str]:
        """Arguments of the script that repeat a setting of the candidate (`arg_mappings`)."""
        values = {
            "train_micro_batch_size_per_gpu": candidate.micro,
            "gradient_accumulation_steps": candidate.steps,
            "train_batch_size": candidate.micro * candidate.steps * self.script.ranks,
            "zero_optimization.stage": candidate.stage,
        }
        mappings = self.settings.autotuning.arg_mappings or {}
        return {str(name): str(values[key]) for key, name in mappings.items() if key in values}

    def _trial(self, candidate: Candidate) -> Outcome:
        section = self.settings.autotuning
        folder = Path(section.exps_dir) / str(candidate).replace(", ", "_").replace(" ", "-")
        metric, config = (folder / "metric.json").resolve(), folder / "ds_config.json"
        if section.overwrite or not metric.is_file():
            metric.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            trial = {
                "enabled": True,
                "metric_path": str(metric),
                "start_profile_step": section.start_profile_step,
                "end_profile_step": section.end_profile_step,
            }
            write_whole(
                config, json.dumps(candidate.config(self.base) | {"autotuning": trial}, indent=2).encode()
            )
            self.say(f"trying {candidate}")
            command = self.script.command(config, self.mapped(candidate))
            reason = run_quietly(command, folder / "output.txt", self.timeout_s)
        else:
            reason = ""
        if not metric.is_file():
            outcome = Outcome(
                candidate=candidate,
                samples_per_s=None,
                reason=reason or f"the script ended before step {section.end_profile_step}",
                out_of_memory=reason == OUT_OF_MEMORY,
            )
        else:
            told = json.loads(metric.read_text(encoding="utf-8"))
            self._told = self._told or told
            outcome = Outcome(candidate=candidate, samples_per_s=told["throughput"], ran=told["ran"])
        self.say(f"{candidate}: {_text(outcome)}")
        return outcome


def _text(outcome: Outcome) -> str:
    return outcome.reason if outcome.samples_per_s is None else f"{outcome.samples_per_s:.4g} samples/s"
