"""scikit-build-core's wheels of this package, with a second metadata folder inside.

Accelerate, Transformers and others ask `importlib.metadata` for the version of "deepspeed". An installer refuses a
wheel with two `.dist-info` folders at its top; what lies under `<name>.data/purelib/` it copies into site-packages
as it is. So the folder for "deepspeed" travels there: it is installed with ds-compat, listed in its RECORD, removed
with it, and has no RECORD of its own, so that `pip uninstall deepspeed` refuses to touch it.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from scikit_build_core import build as _build
from scikit_build_core.build import (  # noqa: F401 - the hooks that stay as they are
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

SOURCE = Path(__file__).resolve().parent / "src"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """The hook of PEP 517."""
    return _extended(
        wheel_directory, _build.build_wheel(wheel_directory, config_settings, metadata_directory)
    )


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """The hook of PEP 660."""
    return _extended(
        wheel_directory, _build.build_editable(wheel_directory, config_settings, metadata_directory)
    )


def _extended(directory, name):
    """The wheel rewritten with the files of `src/*.dist-info` added, and added to its RECORD."""
    path = Path(directory) / name
    data = "-".join(name.split("-")[:2]) + ".data/purelib"
    extra = {
        f"{data}/{file.relative_to(SOURCE).as_posix()}": file.read_bytes()
        for file in sorted(SOURCE.glob("*.dist-info/*"))
    }
    if not any(file.endswith(".dist-info/METADATA") for file in extra):
        raise FileNotFoundError(f"no metadata of deepspeed below {SOURCE}: the source archive is incomplete")
    with zipfile.ZipFile(path) as wheel:
        entries = [(info, wheel.read(info)) for info in wheel.infolist()]
    records = [_record(file, content) for file, content in extra.items()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for info, content in entries:
            if info.filename.endswith(".dist-info/RECORD"):
                for file, added in extra.items():
                    wheel.writestr(zipfile.ZipInfo(file, info.date_time), added)
                content = content.rstrip(b"\n") + b"\n" + b"".join(records)
            wheel.writestr(info, content)
    return name


def _record(file, content):
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{file},sha256={digest},{len(content)}\n".encode()
