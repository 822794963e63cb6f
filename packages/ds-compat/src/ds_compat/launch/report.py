"""The command `ds_report`: prints versions, devices and kernels, like DeepSpeed's command of that name."""

from __future__ import annotations

import sys


def main(hide_operator_status: bool = False, hide_errors_and_warnings: bool = False) -> None:
    """Print versions, operations and the checks of `ds doctor`."""
    import torch

    import ds_compat
    from ds_compat.device import get_accelerator
    from ds_compat.names import VERSION
    from ds_compat.ops.builders import ALL_OPS
    from ds_engine.cli import doctor

    out = sys.stdout.write
    out(f"DeepSpeed names of {VERSION}, provided by ds-compat {ds_compat.__version__}\n")
    if not hide_operator_status:
        out("operations (nothing is compiled on this machine):\n")
        for name, builder in ALL_OPS.items():
            out(f"  {name:24} {'[OKAY]' if builder.is_compatible() else '[NO]'}\n")
    out(f"torch {torch.__version__} in {torch.__path__[0]}\n")
    out(f"accelerator {get_accelerator().device_name()}\n")
    sys.stdout.flush()
    doctor.show_table(doctor.examine())


if __name__ == "__main__":
    main()
