"""Writes on objects of torch's: attributes that a package sets on a module, parameter or optimizer which it was given.

A name stands for such an object if it is a parameter or a local annotated as one, if it is bound to one (an alias, an
element, what `model.get_submodule()` returns), or if a loop gives it the elements of a container of them or of
`model.modules()`. On these, `x.a = ...`, `x.a.b = ...`, `setattr`, `object.__setattr__`, and changes of `vars(x)` or
`x.__dict__` are findings. Objects made by the function itself are its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from checks.finding import Finding, parameters, scopes

TORCH_TYPES = re.compile(
    r"\b(Tensor|Parameter|Module|Optimizer|DeviceMesh|ProcessGroup|[A-Za-z_]*Scheduler)\b"
)
# Attributes of torch's objects that are there to be set.
SETTABLE = frozenset({"data", "grad", "requires_grad", "training"})
# Methods of theirs that give more of them.
GIVES = frozenset(
    {"parameters", "named_parameters", "modules", "named_modules", "children", "named_children", "buffers"}
    | {"named_buffers", "get_submodule", "get_parameter", "get_buffer"}
)
# What passes elements on as they are.
PASSES = frozenset(
    {"enumerate", "zip", "list", "tuple", "set", "reversed", "iter", "next", "filter", "sorted"}
)
WRITES_A_DICT = frozenset({"update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__"})

Function = ast.FunctionDef | ast.AsyncFunctionDef


def foreign_attributes(tree: ast.AST, path: str) -> Iterator[Finding]:
    """One finding for each write, with the function that holds it."""
    for name, node, _ in scopes(tree, path):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            foreign = _foreign_names(node)
            for line, text in _writes(node, foreign):
                message = f"writes `{text}` on an object that is not ours: use a _registry.py"
                yield Finding("foreign-attribute", name, line, message)


def _foreign_names(function: Function) -> frozenset[str]:
    names = {
        a.arg
        for a in parameters(function)
        if a.arg not in ("self", "cls") and a.annotation and TORCH_TYPES.search(ast.unparse(a.annotation))
    }
    while True:  # an alias of an alias: until nothing is added
        more = {name for node in ast.walk(function) for name in _bound(node, names)} - {"self", "cls", "_"}
        if more <= names:
            return frozenset(names)
        names |= more


def _bound(node: ast.AST, foreign: set[str]) -> Iterator[str]:
    """The names that this statement binds to objects of torch's."""
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        if TORCH_TYPES.search(ast.unparse(node.annotation)) and not _is_made(node.value):
            yield node.target.id
    elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
        if _is_foreign(node.iter, foreign):
            yield from _names(node.target)
    elif isinstance(node, ast.Assign) and _is_foreign(node.value, foreign):
        for target in node.targets:
            yield from _names(target)
    elif isinstance(node, ast.NamedExpr) and _is_foreign(node.value, foreign):
        yield node.target.id


def _names(target: ast.expr) -> Iterator[str]:
    if isinstance(target, ast.Name):
        yield target.id
    elif isinstance(target, (ast.Tuple, ast.List)):
        for element in target.elts:
            yield from _names(element)


def _is_made(value: ast.expr | None) -> bool:
    """Whether a call makes the object here: `x: Tensor = torch.zeros(3)`."""
    return isinstance(value, ast.Call)


def _is_foreign(value: ast.expr, foreign: set[str]) -> bool:
    """Whether an expression is an object of torch's that was given, or a container of such."""
    if isinstance(value, ast.Name):
        return value.id in foreign
    if isinstance(value, (ast.Subscript, ast.Starred)):
        return _is_foreign(value.value, foreign)
    if isinstance(value, (ast.List, ast.Tuple)):
        return any(_is_foreign(element, foreign) for element in value.elts)
    if isinstance(value, ast.IfExp):
        return _is_foreign(value.body, foreign) or _is_foreign(value.orelse, foreign)
    if isinstance(value, ast.Call):
        if isinstance(value.func, ast.Attribute):
            return value.func.attr in GIVES or (
                value.func.attr in ("values", "items") and _is_foreign(value.func.value, foreign)
            )
        if isinstance(value.func, ast.Name) and value.func.id in PASSES:
            return any(_is_foreign(argument, foreign) for argument in value.args)
    return False


def _root(value: ast.expr) -> str | None:
    """`a` of `a.b.c`."""
    while isinstance(value, ast.Attribute):
        value = value.value
    return value.id if isinstance(value, ast.Name) else None


def _writes(function: Function, foreign: frozenset[str]) -> Iterator[tuple[int, str]]:
    """(line, what is written) in a function."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if node.attr not in SETTABLE and _root(node.value) in foreign:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            if _is_namespace(node.value, foreign):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and node.args and _is_setattr(node.func):
            if _root(node.args[0]) in foreign:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in WRITES_A_DICT and _is_namespace(node.func.value, foreign):
                yield node.lineno, ast.unparse(node)


def _is_setattr(called: ast.expr) -> bool:
    if isinstance(called, ast.Name):
        return called.id in ("setattr", "delattr")
    return isinstance(called, ast.Attribute) and (
        called.attr in ("__setattr__", "__delattr__") and ast.unparse(called.value) in ("object", "type")
    )


def _is_namespace(value: ast.expr, foreign: frozenset[str]) -> bool:
    """Whether this is `vars(x)` or `x.__dict__` of a foreign x."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "vars":
        return bool(value.args) and _root(value.args[0]) in foreign
    return isinstance(value, ast.Attribute) and value.attr == "__dict__" and _root(value.value) in foreign
