"""The command `ds_elastic`: shows the batch that the section `elasticity` of a file chooses."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Exits with 1 if the section is wrong or does not suit the number of ranks."""
    parser = argparse.ArgumentParser(
        prog="ds_elastic", description="Shows the batch that the section elasticity chooses (ds-compat)."
    )
    parser.add_argument("-c", "--config", required=True, help="a ds_config.json")
    parser.add_argument("-w", "--world-size", type=int, default=0, help="number of ranks")
    options = parser.parse_args(args)
    from ds_compat.config.elasticity import ELASTICITY, compute_elastic_config
    from ds_engine.config import ConfigError, read

    try:
        config = read(options.config)
        results = compute_elastic_config(config, world_size=options.world_size)
    except (ConfigError, FileNotFoundError) as error:
        sys.exit(f"ds_elastic: {error}")
    lines = ["Elasticity config:", json.dumps(config[ELASTICITY], indent=4)]
    lines.append(f"Results for {options.world_size} ranks:" if options.world_size > 0 else "Results:")
    for name, value in zip(("final_batch_size", "valid_gpus", "micro_batch_size"), results, strict=False):
        lines.append(f"{name} {'.' * (19 - len(name))} {value}")
    sys.stdout.write("\n".join(lines) + "\n")
