"""`python -m ds_profiler FOLDER`: from recordings of `ds_profiler.timeline.record` to a page or a trace."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ds_profiler.timeline import load, write_chrome_trace, write_page


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 if the recordings could not be read."""
    parser = argparse.ArgumentParser(
        prog="python -m ds_profiler", description="One page for the recordings of all ranks."
    )
    parser.add_argument("folder", type=Path, help="folder with the files of ds_profiler.timeline.record")
    parser.add_argument(
        "--out",
        type=Path,
        help="the page to write (default: timeline.html in the folder), or a trace for Perfetto if its "
        "name ends in .json or .json.gz",
    )
    parser.add_argument("--title", default="Timeline", help="heading of the page")
    given = parser.parse_args(arguments)
    out: Path = given.out or given.folder / "timeline.html"
    try:
        ranks = load(given.folder)
        if out.name.endswith((".json", ".json.gz")):
            write_chrome_trace(ranks, out)
        else:
            write_page(ranks, out, title=given.title)
    except (OSError, ValueError) as error:
        print(f"ds_profiler: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
