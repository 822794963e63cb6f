"""What an installed wheel answers for `deepspeed`, and its commands."""

from __future__ import annotations

import pytest

from bare import bare


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    wheels = bare.build_wheels(bare.ROOT / "build" / "bare")
    return bare.make("ds-compat", wheels, tmp_path_factory.mktemp("installed") / "env")


def test_metadata_of_deepspeed_comes_with_the_wheel(environment, tmp_path) -> None:
    code = """
import importlib.metadata as m, importlib.util as u
spec = u.find_spec("deepspeed")
print(m.version("deepspeed"), m.metadata("deepspeed")["Name"], spec.origin, "deepspeed" in m.packages_distributions())
owned = {str(f) for f in m.files("ds-compat")}
assert any(f.endswith("deepspeed/__init__.py") for f in owned), owned
assert any("deepspeed-0.19.8+ds.dist-info/METADATA" in f for f in owned), owned
assert m.files("deepspeed") is None  # so that `pip uninstall deepspeed` leaves it alone
import deepspeed
assert deepspeed.__version__ == m.version("deepspeed")
"""
    version, name, origin, known = environment.run(code, tmp_path).split()
    assert version == "0.19.8+ds" and name == "deepspeed" and known == "True"
    assert origin.startswith(str(environment.python.parents[1]))


def test_the_original_among_our_files_is_refused(environment, tmp_path) -> None:
    code = """
import pathlib, importlib.util as u
folder = pathlib.Path(u.find_spec("deepspeed").origin).parent
(folder / "runtime").mkdir()
(folder / "runtime" / "engine.py").touch()
try:
    import deepspeed
except ImportError as error:
    print(error)
finally:
    (folder / "runtime" / "engine.py").unlink()
    (folder / "runtime").rmdir()
"""
    assert "both DeepSpeed and ds-compat are installed" in environment.run(code, tmp_path)
