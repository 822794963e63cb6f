"""Finds the fastest configuration of a job: plans every candidate, and tries a few."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ds_engine.build.layers.tensor import is_of_transformers
from ds_engine.build.memory.model_source import keywords_of, model_factory
from ds_engine.build.memory.plan import Planned
from ds_engine.build.memory.plan_table import Options
from ds_engine.build.memory.predict import Budgets
from ds_engine.build.step_time.planned import measured_rates
from ds_engine.build.step_time.work import ModelWork, work_of, workload
from ds_engine.build.tuning.trial import Spec, run_trial
from ds_engine.config import ConfigError, DsConfig, load
from ds_engine.device import free_bytes
from ds_engine.files import write_whole
from ds_engine.step_time import Rates, simulate
from ds_engine.tune import Candidate, Outcome, Prediction, Search, Space, Tuned, candidates
from ds_engine.tune.candidates import EXPERTS, STAGES
from ds_zero.tensors.sizes import human_bytes


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is tuned, and within which limits."""

    base: Mapping[str, Any]
    """Content of the ds_config.json to start from."""
    model: str
    """As `ds plan --model`."""
    space: Space
    folder: Path = Path("tuning")
    """For trials, the result and its reasons. A search that was interrupted goes on from what lies there."""
    tokens: int | None = None
    budget_bytes: int | None = None
    """Device memory of a rank. None: what is free now, divided among the ranks on a CPU."""
    trials: int = 5
    warm_up: int = 2
    steps: int = 3
    timeout_s: float = 600.0
    rates: Rates | None = None
    """None: measured on this machine."""


def tune(request: Request, say: Callable[[str], None]) -> Tuned:
    """Runs the search, and writes `tuning.json` and, if there is an answer, `ds_config.json` to the folder.

    Args:
        say: called with a line about each thing that happens.

    Raises:
        ConfigError: a mistake in the configuration.
        ValueError: nothing can be tried, or the model cannot be planned.
    """
    request.folder.mkdir(parents=True, exist_ok=True)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    budget = request.budget_bytes or free_bytes(device, request.space.ranks)
    space = request.space
    rates = request.rates
    if rates is None:
        say(f"measuring the model in {space.ranks} processes")
        rates = _measured(request)
    predictions = predict(request, rates, budget)
    fitting = [one for one in predictions if one.fits]
    say(f"{len(predictions)} configurations, of which {len(fitting)} fit into {human_bytes(budget)} a rank")
    earlier = _Trials(request)
    search = Search(predictions, earlier.known([one.candidate for one in predictions]))
    for outcome in search.outcomes:
        say(f"tried before: {_line(outcome)}")

    def trial(candidate: Candidate) -> Outcome:
        say(f"trying {candidate}")
        outcome = earlier.run(candidate)
        say(_line(outcome))
        return outcome

    tuned = search.run(trial, trials=request.trials)
    if tuned.best is None and not fitting:
        tuned = replace(tuned, reason=f"{tuned.reason}; the budget is {human_bytes(budget)}")
    tuned = replace(tuned, why=tuple(explanation(tuned, predictions, budget)))
    _write(request, tuned, predictions, rates)
    return tuned


def predict(request: Request, rates: Rates, budget: int) -> list[Prediction]:
    """Plans every candidate: peak memory, and throughput by the rates."""
    made = []
    works: dict[tuple[int, ...], ModelWork] = {}
    for candidate in candidates(request.space):
        try:
            memory_bytes, seconds = _planned(request, candidate, rates, works)
        except ValueError as error:
            # Some settings of the base, or the model, may not go with every candidate; the others remain. What is
            # wrong with the plainest one is wrong with all.
            if candidate.model_ranks * candidate.expert == 1 and not isinstance(error, ConfigError):
                raise
            made.append(_unplanned(candidate, str(error)))
            continue
        samples = candidate.micro * candidate.steps * (request.space.ranks // candidate.model_ranks)
        made.append(
            Prediction(
                candidate=candidate,
                samples_per_s=samples / seconds,
                memory_bytes=memory_bytes,
                fits=memory_bytes <= budget,
            )
        )
    return made


def _planned(
    request: Request, candidate: Candidate, rates: Rates, works: dict[tuple[int, ...], ModelWork]
) -> tuple[int, float]:
    """Returns the peak of a rank's device memory, and the seconds of a step.

    Args:
        works: operations of the model as it is divided, which are counted once.
    """
    ranks, settings = request.space.ranks, load(candidate.config(request.base))
    factory = model_factory(request.model, tokens=request.tokens, arguments=candidate.arguments())
    if candidate.pipe > 1:
        from ds_engine.build.memory.pipeline_plan import plan_pipeline

        piped = plan_pipeline(settings, factory, ranks, Options(), rates)
        if piped is None or piped.time is None:
            raise ConfigError([f"{request.model} makes no pipeline, although it takes num_stages"])
        return piped.device_bytes, piped.time.total_s
    planned = Planned.of(settings, factory, ranks=ranks)
    plan = planned.memory(checkpointing=candidate.recompute, budgets=Budgets())
    key = (candidate.tensor, candidate.sequence, candidate.expert)
    if key not in works:
        works[key] = work_of(planned.model, planned.inputs, planned.samples, planned.axes)
    return plan.device_bytes, simulate(workload(planned.job, plan, works[key]), rates).total_s


def _unplanned(candidate: Candidate, reason: str) -> Prediction:
    return Prediction(candidate=candidate, samples_per_s=0.0, memory_bytes=0, fits=False, reason=reason)


def _measured(request: Request) -> Rates:
    space = request.space
    micro = next(iter(space.sizes()), (1, 1))[0]
    first = Candidate(stage=min(space.stages), micro=max(micro, min(4, space.max_micro)), steps=1)
    settings = load(first.config(request.base))
    return measured_rates(
        settings, request.model, request.tokens, space.ranks, Options(micro_batch=first.micro)
    )


class _Trials:
    """Runs trials, and remembers them in a file: one JSON object a line."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._file = request.folder / "trials.jsonl"
        facts = [request.model, request.tokens, request.space.ranks, request.warm_up, request.steps]
        text = json.dumps([dict(request.base), facts], sort_keys=True, default=str)
        self._job = hashlib.sha256(text.encode()).hexdigest()[:16]
        """Trials of another job in the same folder do not count."""

    def known(self, among: list[Candidate]) -> list[Outcome]:
        """The outcomes of earlier trials of this job. A line that was cut short by a kill does not count."""
        found = []
        for line in self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            candidate = Candidate(**row["candidate"])
            if row["job"] == self._job and candidate in among:
                found.append(Outcome(**{**row["outcome"], "candidate": candidate}))
        return found

    def run(self, candidate: Candidate) -> Outcome:
        """Runs a trial, and writes it down when it has ended."""
        request = self._request
        spec = Spec(
            config=candidate.config(request.base),
            model=request.model,
            tokens=request.tokens,
            recompute=candidate.recompute,
            arguments=candidate.arguments(),
            warm_up=request.warm_up,
            steps=request.steps,
            out=str((request.folder / "trial.json").resolve()),
        )
        outcome = run_trial(candidate, spec, ranks=request.space.ranks, timeout_s=request.timeout_s)
        row = {
            "job": self._job,
            "candidate": asdict(candidate),
            "outcome": asdict(outcome) | {"candidate": None},
        }
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return outcome


def _line(outcome: Outcome) -> str:
    if outcome.samples_per_s is None:
        return f"{outcome.candidate}: {outcome.reason}"
    return f"{outcome.candidate}: {outcome.samples_per_s:.4g} samples/s"


def _write(request: Request, tuned: Tuned, predictions: list[Prediction], rates: Rates) -> None:
    rows = [asdict(one) | {"candidate": str(one.candidate)} for one in predictions]
    result: dict[str, Any] = {
        "reason": tuned.reason,
        "why": tuned.why,
        "best": None,
        "trials": [asdict(one) | {"candidate": str(one.candidate)} for one in tuned.outcomes],
        "predictions": sorted(rows, key=lambda row: -row["samples_per_s"]),
        "rates": json.loads(rates.to_json()),
    }
    if tuned.best is not None:
        config = tuned.best.candidate.config(request.base)
        result["best"] = config
        write_whole(request.folder / "ds_config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_whole(request.folder / "tuning.json", (json.dumps(result, indent=1) + "\n").encode())


def explanation(tuned: Tuned, predictions: list[Prediction], budget: int) -> list[str]:
    """Why this is the answer: one sentence each."""
    best = tuned.best
    if best is None:
        return [tuned.reason]
    known = {one.candidate: one for one in predictions}[best.candidate]
    said = [
        f"{best.candidate}: {best.samples_per_s:.4g} samples/s measured, {known.samples_per_s:.4g} predicted; "
        f"{human_bytes(known.memory_bytes)} of {human_bytes(budget)} a rank predicted"
    ]
    for one in tuned.outcomes:
        if one.samples_per_s is not None and one is not best:
            said.append(
                f"{one.candidate} reached {one.samples_per_s / (best.samples_per_s or 1.0):.0%} of that"
            )
        elif one.samples_per_s is None:
            said.append(f"{one.candidate} failed: {one.reason}")
    too_large = [one for one in predictions if not one.fits and not one.reason]
    if too_large:
        said.append(f"{len(too_large)} configurations were not tried because they do not fit")
    refused = [one for one in predictions if one.reason]
    if refused:
        said.append(f"{len(refused)} are refused, for example {refused[0].candidate}: {refused[0].reason}")
    if best.candidate.recompute:
        said.append("activations must be recomputed by the model itself: no key of ds_config.json does it")
    return [*said, f"the search ended because {tuned.reason}"]


def with_degrees(space: Space, model: str) -> Space:
    """The space with parallelism within the model: powers of two of tensor- and sequence-parallel ranks for a model of
    Transformers, and of expert- and pipeline-parallel ranks if the user's function takes `ep_size` or `num_stages`.

    Raises:
        ValueError: there is no such function.
    """
    powers = [2**power for power in range(space.ranks.bit_length()) if space.ranks % 2**power == 0]
    keywords = keywords_of(model)
    with torch.device("meta"):
        made = None if keywords & {EXPERTS, STAGES} else model_factory(model)()
    if made is not None and is_of_transformers(made[0] if isinstance(made, tuple) else made):
        space = replace(space, tensors=powers, sequences=powers)
    if EXPERTS in keywords:
        space = replace(space, experts=powers)
    return replace(space, pipes=powers) if STAGES in keywords else space


def space_of(settings: DsConfig, ranks: int, *, offload: bool, recompute: bool) -> Space:
    """The space that a configuration and its section `autotuning` describe. Degrees of parallelism stay as they are."""
    tuning = settings.autotuning
    given = settings.zero_optimization.model_fields_set
    only_sizes = tuning.fast and "fast" in tuning.model_fields_set
    stages = (settings.zero_optimization.stage,) if only_sizes and "stage" in given else (0, 1, 2, 3)
    return Space(
        ranks=ranks,
        train_batch=settings.train_batch_size,
        steps=settings.gradient_accumulation_steps or 1,
        stages=stages,
        offloads=("none", "cpu") if offload else ("none",),
        recompute=(False, True) if recompute else (False,),
        tensors=(settings.tensor_parallel.ranks,),
        sequences=(settings.sequence_parallel_size or 1,),
        min_micro=tuning.min_train_micro_batch_size_per_gpu,
        max_micro=tuning.max_train_micro_batch_size_per_gpu,
        min_train=tuning.min_train_batch_size,
        max_train=tuning.max_train_batch_size,
    )
