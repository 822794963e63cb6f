"""Checks the size budgets and the rules that no other tool knows, over packages/*/src, ci/ and cpp/.

    python ci/checks/budgets.py [FILE ...]        without files: everything

Each rule has a name. An exception is one entry in budget_exceptions.toml, with the reason; one that is no
longer needed is an error too, so that the list only holds what is true.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it finds its neighbours

from checks.finding import Finding, parameters, scopes
from checks.foreign import foreign_attributes

ROOT = Path(__file__).resolve().parents[2]
EXCEPTIONS = Path(__file__).with_name("budget_exceptions.toml")

FILE_LINES = 500
FUNCTION_LINES = 60
CLASS_MEMBERS = 25
CONSTRUCTOR_ARGUMENTS = 10
FOLDER_MODULES = 20
PACKAGE_LINES: Mapping[str, int] = {"ds-compat": 6000}
"""Packages that stay thin: lines with something on them, over all their files. ds-compat has one line or more for each
name of DeepSpeed's, and the behaviour of those that code relies on; what trains is elsewhere."""

# Import names of layer 1: no state of the process may live in them, except in a _registry.py.
LAYER_1 = frozenset(
    {"ds_comm", "ds_zero", "ds_offload", "ds_pipe", "ds_moe", "ds_layers", "ds_profiler", "ds_checkpoint"}
)
# The only places where one kind of accelerator may be named.
DEVICE_FILES = frozenset({"device.py", "devices.py", "doctor.py", "_gpu.py"})
MUTABLE_CALLS = frozenset(
    {
        "dict",
        "list",
        "set",
        "bytearray",
        "defaultdict",
        "deque",
        "Counter",
        "OrderedDict",
        "WeakKeyDictionary",
    }
    | {"WeakValueDictionary", "WeakSet", "local", "ContextVar", "count", "Lock", "RLock"}
)
# Annotated as one of these, a literal is a table that mypy lets nobody change.
READ_ONLY = re.compile(r"\b(Mapping|Sequence|AbstractSet|Collection)\b")


def check_source(source: str, path: str) -> list[Finding]:
    """All findings in one Python file; `path` is relative to the repository and tells the package."""
    tree = ast.parse(source, path)
    findings = [*_file_size(source, path), *_sizes(tree, path), *foreign_attributes(tree, path)]
    parts = Path(path).parts
    if LAYER_1 & set(parts) and parts[-1] != "_registry.py":
        findings += _module_state(tree, path)
    if "src" in parts and parts[-1] not in DEVICE_FILES:
        findings += _device_literals(tree, path)
    return findings


def _file_size(source: str, path: str) -> Iterator[Finding]:
    lines = source.count("\n")
    if lines > FILE_LINES:
        yield Finding(
            "file-lines", path, 1, f"{lines} lines, at most {FILE_LINES}: give a second noun its own file"
        )


def _sizes(tree: ast.AST, path: str) -> Iterator[Finding]:
    for name, node, parent in scopes(tree, path):
        if isinstance(node, ast.ClassDef):
            yield from _class_size(node, name)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = _body_lines(node)
            if lines > FUNCTION_LINES:
                yield Finding("function-lines", name, node.lineno, f"{lines} lines, at most {FUNCTION_LINES}")
            if node.name == "__init__" and isinstance(parent, ast.ClassDef):
                arguments = len(parameters(node)) - 1
                if arguments > CONSTRUCTOR_ARGUMENTS:
                    message = (
                        f"{arguments} arguments, at most {CONSTRUCTOR_ARGUMENTS}: pass an options dataclass"
                    )
                    yield Finding("constructor-arguments", name, node.lineno, message)


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring: explaining a function is not what makes it long."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def _class_size(node: ast.ClassDef, name: str) -> Iterator[Finding]:
    methods = {f.name for f in node.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))}
    public = {m for m in methods if not m.startswith("_")}
    attributes = {
        s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)
    }
    for target in _attribute_targets(node):
        if isinstance(target.value, ast.Name) and target.value.id == "self":
            attributes.add(target.attr)
    for what, members in (("public methods", public), ("attributes", attributes)):
        # Frozen options, as a dataclass or as a section of the configuration, are a table of settings, not
        # state: their fields do not count.
        if len(members) > CLASS_MEMBERS and not (what == "attributes" and _is_options(node)):
            message = (
                f"{len(members)} {what}, at most {CLASS_MEMBERS}: split the class by what changes together"
            )
            yield Finding("class-members", name, node.lineno, message)


def _is_options(node: ast.ClassDef) -> bool:
    text = " ".join(ast.unparse(d) for d in node.decorator_list)
    return ("dataclass" in text and "frozen=True" in text) or "Section" in map(ast.unparse, node.bases)


def _attribute_targets(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Every `x.y` that is written: assigned, augmented, annotated, deleted, or bound by `for` or `with`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            yield node


def _module_state(tree: ast.Module, path: str) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            message = (
                f"`global {', '.join(node.names)}`: no state of the process in layer 1; pass the value in"
            )
            yield Finding("module-state", f"{path}::{node.names[0]}", node.lineno, message)
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            names, value = [t.id for t in statement.targets if isinstance(t, ast.Name)], statement.value
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if READ_ONLY.search(ast.unparse(statement.annotation)):
                continue
            names, value = [statement.target.id], statement.value  # type: ignore[assignment]
        else:
            continue
        if names and names != ["__all__"] and _is_mutable(value):
            message = f"`{names[0]}` is mutable: use a tuple or a frozenset, or annotate it Mapping"
            yield Finding("module-state", f"{path}::{names[0]}", statement.lineno, message)


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, (ast.Dict, ast.List, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)):
        return True
    if not isinstance(value, ast.Call):
        return False
    function = value.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in MUTABLE_CALLS


def _device_literals(tree: ast.AST, path: str) -> Iterator[Finding]:
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if (text and re.match(r"cuda(:\d+)?$", str(node.value))) or (  # type: ignore[attr-defined]
            isinstance(node, ast.Attribute) and node.attr == "cuda"
        ):
            message = "names one kind of device: ask torch.accelerator, or move it to a device file"
            yield Finding("device-literal", path, node.lineno, message)  # type: ignore[attr-defined]


def check_native(source: str, path: str) -> list[Finding]:
    """The rules for C++ and CUDA sources."""
    findings = list(_file_size(source, path))
    for number, line in enumerate(source.splitlines(), 1):
        if path.endswith((".h", ".hpp", ".cuh")) and re.match(r"\s*namespace\s*\{", line):
            findings.append(
                Finding("header-namespace", path, number, "unnamed namespace in a header: one copy per file")
            )
        if re.search(r"#\s*include\s*[<\"](torch|ATen|c10)/", line):
            findings.append(Finding("native-torch", path, number, "the native core knows no torch"))
        if "/bindings/" not in path and re.search(r"#\s*include\s*[<\"](Python\.h|pybind11/)", line):
            findings.append(Finding("native-python", path, number, "Python stays in cpp/bindings"))
    return findings


def check_packages(sizes: Iterable[tuple[str, int]]) -> list[Finding]:
    """Packages over their budget.

    Args:
        sizes: path of a file relative to the repository, and its lines with something on them.
    """
    totals: Counter[str] = Counter()
    for path, lines in sizes:
        totals[Path(path).parts[1]] += lines
    return [
        Finding(
            "package-lines", f"packages/{name}", 1, f"{totals[name]} lines that are not empty, at most {most}"
        )
        for name, most in PACKAGE_LINES.items()
        if totals[name] > most
    ]


def check_folders(paths: Iterable[str]) -> list[Finding]:
    """Folders with more modules than a reader can keep apart; `__init__.py` does not count.

    Args:
        paths: files relative to the repository.
    """
    modules = Counter(str(Path(path).parent) for path in paths if Path(path).name != "__init__.py")
    return [
        Finding(
            "folder-modules",
            folder,
            1,
            f"{count} modules, at most {FOLDER_MODULES}: put those that belong together into a folder of their own",
        )
        for folder, count in sorted(modules.items())
        if count > FOLDER_MODULES
    ]


def load_exceptions(text: str) -> dict[tuple[str, str], str]:
    """(rule, where) -> reason; an entry without a reason is refused."""
    entries = {}
    for entry in tomllib.loads(text).get("exception", []):
        if not entry.get("reason", "").strip():
            raise SystemExit(f"budget_exceptions.toml: {entry.get('where')} needs a reason")
        entries[entry["rule"], entry["where"]] = entry["reason"]
    return entries


def sift(findings: list[Finding], exceptions: dict[tuple[str, str], str]) -> tuple[list[Finding], list[str]]:
    """(findings without an exception, exceptions without a finding)."""
    found = {(f.rule, f.where) for f in findings}
    unused = [f"{rule} at {where}" for rule, where in exceptions if (rule, where) not in found]
    return [f for f in findings if (f.rule, f.where) not in exceptions], unused


def main(arguments: list[str]) -> int:
    """Prints what is over budget; 1 if there is anything."""
    python = sorted(ROOT.glob("packages/*/src/**/*.py")) + sorted((ROOT / "ci").rglob("*.py"))
    native = [
        p
        for p in sorted((ROOT / "cpp").rglob("*"))
        if p.suffix in {".h", ".cc", ".cpp", ".cu", ".cuh", ".inc"}
    ]
    wanted = {Path(a).resolve() for a in arguments}
    findings: list[Finding] = []
    for path in [*python, *native]:
        if not wanted or path in wanted:
            check = check_source if path.suffix == ".py" else check_native
            findings += check(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    if not wanted:
        findings += check_folders(path.relative_to(ROOT).as_posix() for path in python)
    findings += check_packages(
        (
            path.relative_to(ROOT).as_posix(),
            sum(bool(line.strip()) for line in path.read_text("utf-8").splitlines()),
        )
        for path in python
        if not wanted and "packages" in path.relative_to(ROOT).parts
    )
    kept, unused = sift(findings, load_exceptions(EXCEPTIONS.read_text(encoding="utf-8")))
    for finding in kept:
        print(finding)
    for name in unused if not wanted else []:
        print(f"budget_exceptions.toml: no longer needed: {name}")
    return 1 if kept or (unused and not wanted) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
