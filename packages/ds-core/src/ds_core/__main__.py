"""`python -m ds_core`: prints which kernels are native here, and why the others are not."""

from __future__ import annotations

import sys

from ds_core import report


def main() -> int:
    """Prints the report. Returns 1 and prints a message if DS_CPU_TARGET names a target that this CPU cannot run."""
    try:
        print(report.text())
    except ValueError as error:
        print(f"ds_core: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
