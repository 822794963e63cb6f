"""`ds config`: check, explain and compare configurations without starting anything."""

from __future__ import annotations

import json
import sys
import warnings
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ds_engine.config.sections.model import DsConfig

app = typer.Typer(
    name="config",
    help="Check, explain and compare ds_config.json files.",
    no_args_is_help=True,
    add_completion=False,
)

File = Annotated[str, typer.Argument(help="A ds_config.json.")]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", "-n", min=1, help="Number of data-parallel ranks, for the batch sizes."),
]


@app.command()
def check(file: File, ranks: Ranks = None) -> None:
    """Report every mistake; the exit code is 0 if there is none, else 1."""
    from ds_engine.config.built import effectless

    config = _load(file, ranks)
    for path, why in effectless(config).items():
        print(f"note: {path} has no effect: {why}")
    for path in config.origin.autos:
        print(f'note: {path} is "auto": an integration replaces it; otherwise its default is used')
    print(f"{file} is valid")


@app.command()
def explain(
    file: File,
    ranks: Ranks = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Include keys that are not set, with their defaults.")
    ] = False,
) -> None:
    """Show every value, and its origin: a line of the file, a default, an equation, or "auto"."""
    from ds_engine.config.report.explain import explain as settings
    from ds_engine.config.report.explain import table

    print(table(settings(_load(file, ranks), ranks=ranks, defaults=everything)))


@app.command()
def diff(first: File, second: File, ranks: Ranks = None) -> None:
    """Compare the meaning of two files; the exit code is 0 if they mean the same, else 1."""
    from ds_engine.config.report.diff import diff as differences

    differing = differences(_load(first, ranks), _load(second, ranks), ranks=ranks)
    for item in differing:
        print(f"{item.path}: {json.dumps(item.first, default=str)} -> {json.dumps(item.second, default=str)}")
    if not differing:
        print("they mean the same")
    raise typer.Exit(1 if differing else 0)


@app.command()
def elastic(file: File, ranks: Ranks = None) -> None:
    """Show the batch that the section elasticity chooses, and the numbers of ranks that can share it.

    With --ranks, also the micro-batch size and the accumulation steps; the exit code is 1 if that number of ranks
    cannot share a batch.
    """
    from ds_engine.config.elastic import ElasticityError
    from ds_engine.config.elastic.section import elastic_batch

    config = _load(file, ranks)
    if not config.elasticity.enabled:
        print(f"{file}: elasticity.enabled is not true", file=sys.stderr)
        raise typer.Exit(1)
    try:
        chosen = elastic_batch(config.elasticity, ranks)
    except ElasticityError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"train_batch_size {chosen.train}")
    print(f"ranks {', '.join(map(str, chosen.ranks))}")
    if ranks is not None:
        batch = chosen.on(ranks)
        print(f"train_micro_batch_size_per_gpu {batch.micro} on {ranks} ranks")
        print(f"gradient_accumulation_steps {batch.steps} on {ranks} ranks")


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page instead.")] = False,
) -> None:
    """Print a JSON schema of all keys, for editors."""
    if markdown:
        from ds_engine.config.report.reference import reference

        print(reference(), end="")
    else:
        from ds_engine.config.report.json_schema import json_schema

        print(json.dumps(json_schema(), indent=2))


def _load(file: str, ranks: int | None) -> DsConfig:
    """Reads the configuration and prints its warnings; ends the program if there are mistakes."""
    from ds_engine import rules
    from ds_engine.config import ConfigError
    from ds_engine.job import choices_of

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            # In a file, "auto" is valid for keys that integrations replace.
            config = rules.load(file, choices_of, autos_may_stay=True)
            if ranks is not None:
                config.batch(ranks)
        except (ConfigError, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            raise typer.Exit(1) from None
    for warning in said:
        print(f"warning: {warning.message}", file=sys.stderr)
    return config
