"""Every package, installed alone from its wheel, does what its README shows."""

from __future__ import annotations

import pytest

from bare import bare


@pytest.fixture(scope="module")
def wheels():
    return bare.build_wheels(bare.ROOT / "build" / "bare")


@pytest.fixture(scope="module", params=bare.PACKAGES)
def alone(request, wheels, tmp_path_factory):
    """(name of a package, the environment with it alone)."""
    if request.param not in wheels:
        pytest.skip("no nvcc 12.8 or newer on the PATH: this package cannot be built")
    return request.param, bare.make(request.param, wheels, tmp_path_factory.mktemp(request.param) / "env")


def test_import_of_an_installed_wheel(alone, tmp_path):
    package, environment = alone
    module = package.replace("-", "_")
    code = f"import {module}, importlib.metadata as m; print({module}.__file__, m.version({package!r}))"
    file, version = environment.run(code, tmp_path).split()
    assert file.startswith(str(environment.python.parents[1]))
    assert version == (bare.ROOT / "VERSION").read_text().strip()


def test_nothing_else_is_there(alone, tmp_path):
    package, environment = alone
    absent = {name.replace("-", "_") for name in set(bare.PACKAGES) - environment.packages} | {
        "pytest",
        "mypy",
    }
    if package not in ("ds-engine", "ds-compat"):
        absent |= {"pydantic", "rich", "typer", "safetensors"}
    code = f"import importlib.util as u; print([n for n in {sorted(absent)} if u.find_spec(n)])"
    assert environment.run(code, tmp_path).strip() == "[]"


def test_every_module_imports_with_what_is_declared(alone, tmp_path):
    package, environment = alone
    module = package.replace("-", "_")
    code = f"""
import importlib, pkgutil, {module}
names = [m.name for m in pkgutil.walk_packages({module}.__path__, "{module}.")]
# libds_*: a plain shared library, which pkgutil takes for a module
names = [name for name in names if not name.endswith("__main__") and ".libds_" not in name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    assert int(environment.run(code, tmp_path)) > 0


def test_example_of_the_readme(alone, tmp_path):
    package, environment = alone
    environment.run(bare.example(package), tmp_path)


def test_typed(alone, tmp_path):
    package, environment = alone
    module = package.replace("-", "_")
    code = (
        f"from importlib import resources; print(resources.files({module!r}).joinpath('py.typed').is_file())"
    )
    assert environment.run(code, tmp_path).strip() == "True"
