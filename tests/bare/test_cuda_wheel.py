"""The wheel of the CUDA library: the file, its tag, what it links, and that ds_core finds and opens it."""

from __future__ import annotations

import re
import shutil
import zipfile

import pytest

from bare import bare

pytestmark = pytest.mark.skipif(not bare.HAS_NVCC, reason="no nvcc 12.8 or newer on the PATH")
LIBRARY = "ds_core_cu13/libds_core_cuda.so"


@pytest.fixture(scope="module")
def wheels():
    return bare.build_wheels(bare.ROOT / "build" / "bare")


def test_the_wheel_holds_the_library_and_fits_every_python(wheels):
    wheel = wheels["ds-core-cu13"]
    assert re.fullmatch(r"ds_core_cu13-[\d.]+-py3-none-(many)?linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY in archive.namelist()
        assert archive.getinfo(LIBRARY).file_size < 5 << 20
        assert not any(name.startswith("ds_core/") for name in archive.namelist())


def test_the_library_exports_its_c_interface_and_nothing_else(wheels, tmp_path):
    with zipfile.ZipFile(wheels["ds-core-cu13"]) as archive:
        library = archive.extract(LIBRARY, tmp_path)
    bare.run(["bash", str(bare.ROOT / "ci" / "check_symbols"), library])


@pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="no cuobjdump on the PATH")
def test_the_library_has_code_for_each_architecture(wheels, tmp_path):
    with zipfile.ZipFile(wheels["ds-core-cu13"]) as archive:
        library = archive.extract(LIBRARY, tmp_path)
    listed = bare.run(["cuobjdump", "--list-elf", library])
    assert set(re.findall(r"\bsm_\d+", listed)) == ({"sm_80", "sm_90", "sm_100"} if bare.FULL else {"sm_100"})
    assert "sm_100" in bare.run(["cuobjdump", "--list-ptx", library])  # for what comes after


def test_ds_core_finds_it_and_opens_it(wheels, tmp_path):
    environment = bare.make("ds-core-cu13", wheels, tmp_path / "env")
    report = environment.run("from ds_core import report; print(report.text())", tmp_path)
    library = next(iter((tmp_path / "env").rglob("libds_core_cuda.so")))
    assert str(library) in report  # opened, or closed because this torch has no CUDA: then it says so
    # Without torch's CUDA the search stops early; what opening does is the same: the file loads, the ABI number fits.
    opened = environment.run(
        f"import os; os.environ['DS_CUDA_LIBRARY'] = {str(library)!r}\n"
        "import ds_core_cu13\n"
        f"assert str(ds_core_cu13.library_path()) == {str(library)!r}\n"
        "from ds_core import report; print(report.text())",
        tmp_path,
    )
    assert re.search(rf"^CUDA library +{re.escape(str(library))}, \d+ device", opened, re.MULTILINE)
    assert re.search(r"^adam_step +native +native$", opened, re.MULTILINE)
