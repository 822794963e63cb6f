"""`ds tune`: finds the fastest configuration by predictions and a few trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ds_engine.cli.plan import Budget, Config, Model, Tokens
from ds_engine.step_time import read_rates

if TYPE_CHECKING:
    from ds_engine.build.tuning import Request
    from ds_engine.tune import Space


RanksHere = Annotated[
    int | None,
    typer.Option("--ranks", "-n", min=1, help="Ranks, all on this machine. Default: as `ds run`."),
]
Folder = Annotated[
    str,
    typer.Option("--out", help="Folder for trials and result; a search that was interrupted goes on there."),
]
Trials = Annotated[
    int | None,
    typer.Option(
        "--trials", min=1, help="Trainings that are started at most. Default: 5, or tuner_num_trials."
    ),
]
MaxMicroBatch = Annotated[
    int | None, typer.Option("--max-micro-batch", min=1, help="Largest micro-batch that is tried.")
]
RatesFile = Annotated[
    str | None,
    typer.Option("--rates", help="JSON with the rates of the machine. Default: they are measured."),
]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Also try recomputing the activations of every block.")
]
Parallel = Annotated[
    bool,
    typer.Option(
        "--parallel",
        help="Also try dividing the model: tensor and sequence parallelism for models of Transformers; experts and "
        "pipeline stages if the function takes ep_size or num_stages.",
    ),
]
Buckets = Annotated[
    str | None,
    typer.Option(
        "--buckets", help="Sizes of gradient buckets to try, in elements, for example 500000,50000000."
    ),
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds after which a trial has failed.")]


def tune(
    config: Config,
    model: Model,
    ranks: RanksHere = None,
    folder: Folder = "tuning",
    trials: Trials = None,
    max_micro_batch: MaxMicroBatch = None,
    tokens: Tokens = None,
    budget: Budget = None,
    rates: RatesFile = None,
    recompute: Recompute = False,
    parallel: Parallel = False,
    buckets: Buckets = None,
    timeout: Timeout = 600.0,
) -> None:
    """Find the fastest configuration that fits, and write it with its reasons. The exit code is 1 if there is none.

    Tries ZeRO stages, micro-batches and accumulation, on an accelerator also offload, and what options add.
    train_batch_size stays as it is, if the configuration has one.
    """
    from ds_engine.build.tuning import tune as search
    from ds_engine.cli.sizes import parse_bytes
    from ds_engine.config import ConfigError

    try:
        request = _request(config, model, ranks, trials, max_micro_batch, recompute)
        request = replace(request, space=_wider(request.space, model, parallel, buckets))
        tuned = search(
            replace(
                request,
                folder=Path(folder),
                tokens=tokens,
                budget_bytes=None if budget is None else parse_bytes(budget),
                timeout_s=timeout,
                rates=None if rates is None else read_rates(rates),
            ),
            lambda line: typer.echo(line, err=True),
        )
    except (ConfigError, ValueError, OSError) as error:
        typer.echo(f"ds tune: {error}", err=True)
        raise typer.Exit(2) from None
    for line in tuned.why:
        typer.echo(line)
    if tuned.best is not None:
        typer.echo(str(Path(folder) / "ds_config.json"))
    raise typer.Exit(1 if tuned.best is None else 0)


def _wider(space: Space, model: str, parallel: bool, buckets: str | None) -> Space:
    """The space with what --parallel and --buckets add."""
    from ds_engine.build.tuning.tuner import with_degrees
    from ds_engine.cli.sizes import parse_counts

    if parallel:
        space = with_degrees(space, model)
    if buckets is None:
        return space
    sizes = parse_counts("--buckets", buckets, "elements separated by commas, such as 500000,50000000")
    return replace(space, buckets=sizes)


def _request(
    config: str, model: str, ranks: int | None, trials: int | None, max_micro: int | None, recompute: bool
) -> Request:
    """What the configuration says about the search, changed by options."""
    from ds_engine.build.tuning import Request
    from ds_engine.build.tuning.tuner import space_of
    from ds_engine.config import load
    from ds_engine.config.load.source import read
    from ds_engine.launch.devices import count_accelerators

    settings, accelerators = load(config), count_accelerators()
    space = space_of(settings, ranks or accelerators or 2, offload=accelerators > 0, recompute=recompute)
    if max_micro is not None:
        space = replace(space, max_micro=max_micro)
    given = settings.autotuning
    number = given.tuner_num_trials if "tuner_num_trials" in given.model_fields_set else 5
    return Request(
        base=read(config),
        model=model,
        space=space,
        trials=trials or number,
        warm_up=given.start_profile_step - 1,
        steps=given.end_profile_step - given.start_profile_step + 1,
    )
