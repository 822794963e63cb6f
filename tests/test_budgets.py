"""The checker of budgets, pins and versions: every rule fires on a bad sample and is silent on a good one."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from checks import budgets, versions

L1 = "packages/ds-zero/src/ds_zero/sample.py"


def rules(source: str, path: str = L1) -> list[str]:
    return [finding.rule for finding in budgets.check_source(textwrap.dedent(source), path)]


@pytest.mark.parametrize("lines, expected", [(500, []), (501, ["file-lines"])])
def test_long_files(lines, expected):
    assert rules("x = 1\n" * lines) == expected
    assert [f.rule for f in budgets.check_native("int x;\n" * lines, "cpp/src/cpu/x.cc")] == expected


@pytest.mark.parametrize("body, expected", [(59, []), (60, ["function-lines"])])
def test_long_functions_where_a_docstring_does_not_count(body, expected):
    docstring = '    """One.\n\n    Three lines.\n    """\n'
    assert rules("def f():\n" + docstring + "    x = 1\n" * body) == expected


@pytest.mark.parametrize("members, expected", [(25, []), (26, ["class-members"])])
def test_large_classes(members, expected):
    methods = "".join(f"    def m{i}(self): ...\n" for i in range(members))
    assert rules("class A:\n    def _own(self): ...\n" + methods) == expected
    attributes = "".join(f"        self.a{i} = {i}\n" for i in range(members))
    assert rules("class A:\n    def __init__(self):\n" + attributes) == expected
    fields = "".join(f"    a{i}: int = 0\n" for i in range(members))
    assert rules("@dataclass\nclass A:\n" + fields) == expected
    assert rules("@dataclass(frozen=True, kw_only=True)\nclass A:\n" + fields) == []
    assert rules("class A(Section):\n" + fields) == []


@pytest.mark.parametrize("arguments, expected", [(10, []), (11, ["constructor-arguments"])])
def test_constructors_with_many_arguments(arguments, expected):
    names = [f"a{i}" for i in range(arguments)]
    for signature in (", ".join(names), "*, " + ", ".join(names), ", ".join(names[:-1]) + ", *rest"):
        assert rules(f"class A:\n    def __init__(self, {signature}): ...\n") == expected
    assert rules(f"def __init__(self, {', '.join(names)}): ...\n") == []


@pytest.mark.parametrize(
    "statement",
    [
        "cache = {}",
        "seen: list[int] = []",
        "x = dict(a=1)",
        "x = weakref.WeakKeyDictionary()",
        "lock = Lock()",
    ],
)
def test_mutable_state_of_a_module_in_layer_1(statement):
    assert rules(statement) == ["module-state"]
    assert rules(statement, "packages/ds-zero/src/ds_zero/_registry.py") == []
    assert rules(statement, "packages/ds-engine/src/ds_engine/sample.py") == []


def test_global_statement_in_layer_1():
    assert rules("x = None\ndef f():\n    global x\n    x = 1\n") == ["module-state"]


@pytest.mark.parametrize(
    "statement",
    [
        "A = (1, 2)",
        "A = frozenset({1})",
        "A: Mapping[str, int] = {'a': 1}",
        "__all__ = ['a']",
        "A = len([1])",
    ],
)
def test_constants_of_a_module_are_fine(statement):
    assert rules(statement) == []


@pytest.mark.parametrize(
    "annotation, statement",
    [
        ("torch.nn.Parameter", "x.ds_id = 1"),
        ("Tensor", "x.calls += 1"),
        ("nn.Module | None", "setattr(x, 'ds', 1)"),
        ("torch.optim.Optimizer", "del x.step"),
        ("'nn.Module'", "x.a, y = 1, 2"),
    ],
)
def test_attribute_on_a_foreign_object(annotation, statement):
    assert rules(f"def f(x: {annotation}):\n    {statement}\n") == ["foreign-attribute"]
    assert rules(f"class A:\n    def f(self, *, x: {annotation}):\n        {statement}\n") == [
        "foreign-attribute"
    ]


@pytest.mark.parametrize(
    "statement", ["x.grad = None", "x.data = y", "y.ds_id = 1", "z = x.shape", "x[0] = 1"]
)
def test_what_torch_wants_to_be_set_may_be_set(statement):
    assert rules(f"def f(x: torch.Tensor, y: Mine):\n    {statement}\n") == []


@pytest.mark.parametrize(
    "statement",
    [
        "for m in x.modules():\n        m._leaf = True",
        "for name, p in x.named_parameters():\n        p.ds_id = 1",
        "for i, m in enumerate(x.children()):\n        setattr(m, 'i', i)",
        "for p in list(x.parameters()):\n        vars(p).update(a=1)",
        "vars(x)['_parameters'] = {}",
        "del x.__dict__['forward']",
        "x.__dict__.setdefault('a', 1)",
        "object.__setattr__(x, '__class__', A)",
        "m = x.get_submodule('a')\n    m.mark = 1",
        "same = x\n    same.mark = 1",
        "x.config.use_cache = False",
        "[setattr(p, 'a', 1) for p in x.parameters()]",
        "m: nn.Module = y[0]\n    m.mark = 1",
    ],
)
def test_writes_that_do_not_name_the_parameter(statement):
    assert rules(f"def f(x: nn.Module, y):\n    {statement}\n") == ["foreign-attribute"]


@pytest.mark.parametrize(
    "annotation, loop",
    [
        ("Iterable[nn.Parameter]", "for p in x"),
        ("Mapping[str, Tensor]", "for k, p in x.items()"),
        ("list[nn.Module]", "for p, n in zip(x, y)"),
    ],
)
def test_attributes_on_the_elements_of_a_container(annotation, loop):
    assert rules(f"def f(x: {annotation}, y):\n    {loop}:\n        p.mark = n\n") == ["foreign-attribute"]


@pytest.mark.parametrize(
    "statement",
    [
        "for p in x.parameters():\n        p.grad = None",
        "for unit in units:\n        unit.count = 1",
        "made: Tensor = torch.zeros(3)\n    made.mark = 1",
        "states = [State(p) for p in x.parameters()]\n    states[0].count = 1",
        "vars(units)['a'] = 1",
        "names = dict(x.named_parameters())\n    names.update(a=1)",
    ],
)
def test_writes_on_what_is_ours(statement):
    assert rules(f"def f(x: nn.Module, units):\n    {statement}\n") == []


def test_own_module_may_set_its_own_attributes():
    assert rules("class A(nn.Module):\n    def __init__(self: nn.Module):\n        self.a = 1\n") == []


@pytest.mark.parametrize(
    "expression", ["torch.device('cuda')", "x.to('cuda:1')", "torch.cuda.is_available()"]
)
def test_device_literal(expression):
    assert rules(f"def f(x):\n    return {expression}\n") == ["device-literal"]
    assert rules(f"def f(x):\n    return {expression}\n", "packages/ds-comm/src/ds_comm/device.py") == []
    assert rules("'''cuda'''\n") == []


@pytest.mark.parametrize(
    "path, line, rule",
    [
        ("cpp/include/ds/a.h", "namespace {", "header-namespace"),
        ("cpp/src/cpu/a.cc", "#include <ATen/ATen.h>", "native-torch"),
        ("cpp/bindings/a.cc", "#include <torch/extension.h>", "native-torch"),
        ("cpp/src/io/a.cc", "#include <Python.h>", "native-python"),
    ],
)
def test_native_rules(path, line, rule):
    assert [f.rule for f in budgets.check_native(line + "\n", path)] == [rule]


def test_native_code_that_is_fine():
    assert budgets.check_native("#include <pybind11/pybind11.h>\nnamespace {\n", "cpp/bindings/core.cc") == []


def test_an_exception_covers_one_place_and_must_be_needed():
    findings = budgets.check_source("a = {}\nb = {}\n", L1)
    exceptions = budgets.load_exceptions(
        f'[[exception]]\nrule = "module-state"\nwhere = "{L1}::a"\nreason = "because"\n'
        f'[[exception]]\nrule = "module-state"\nwhere = "{L1}::gone"\nreason = "because"\n'
    )
    kept, unused = budgets.sift(findings, exceptions)
    assert [f.where for f in kept] == [f"{L1}::b"]
    assert unused == [f"module-state at {L1}::gone"]


def test_an_exception_needs_a_reason():
    with pytest.raises(SystemExit, match="needs a reason"):
        budgets.load_exceptions('[[exception]]\nrule = "file-lines"\nwhere = "x"\nreason = " "\n')


def test_one_file_can_be_checked_alone(capsys):
    assert budgets.main([str(Path(budgets.__file__))]) == 0
    assert capsys.readouterr().out == ""


def test_versions():
    good = {
        "ds-a": {"name": "ds-a", "version": "1.2.3", "dependencies": ["torch>=2.11"]},
        "ds-b": {"name": "ds-b", "version": "1.2.3", "dependencies": ["ds-a==1.2.3"]},
    }
    assert versions.check("1.2.3", good) == []
    assert "version is '1.2.3'" in versions.check("1.2.4", good)[0]
    for requirement, message in (("ds-a>=1.2.3", "has to be 'ds-a==1.2.3'"), ("ds-z==1.2.3", "no package")):
        bad = {**good, "ds-b": {**good["ds-b"], "dependencies": [requirement]}}
        (wrong,) = versions.check("1.2.3", bad)
        assert message in wrong
    extra = {**good, "ds-b": {**good["ds-b"], "optional-dependencies": {"all": ["ds-a"]}}}
    assert "has to be" in versions.check("1.2.3", extra)[0]
    assert "differ" in versions.check("1.2.3", {**good, "ds-c": {**good["ds-a"]}})[0]


@pytest.mark.parametrize(("lines", "expected"), [(6000, []), (6001, ["package-lines"])])
def test_packages_that_stay_thin(lines, expected):
    sizes = [
        ("packages/ds-compat/src/ds_compat/a.py", lines - 7),
        ("packages/ds-compat/src/deepspeed/b.py", 7),
    ]
    found = budgets.check_packages([*sizes, ("packages/ds-zero/src/ds_zero/c.py", 9000)])
    assert [f.rule for f in found] == expected


@pytest.mark.parametrize(("modules", "expected"), [(20, []), (21, ["folder-modules"])])
def test_folders_with_many_modules(modules, expected):
    room = "packages/ds-zero/src/ds_zero/runtime"
    paths = [f"{room}/m{i}.py" for i in range(modules)] + [f"{room}/__init__.py", f"{room}/reduce/a.py"]
    overfull = budgets.check_folders(paths)
    assert [f.rule for f in overfull] == expected
    assert [f.where for f in overfull] == [room] * len(expected)
