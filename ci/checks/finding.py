"""What a check reports, and what all checks of Python sources ask of a syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One broken rule: `where` is what an exception has to name."""

    rule: str
    where: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.where.split('::')[0]}:{self.line}: [{self.rule}] {self.message}  ({self.where})"


def scopes(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """(qualified name, node, parent) of every function and class below `tree`."""
    for child in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{prefix}{'.' if '::' in prefix else '::'}{child.name}"
            yield name, child, tree
        yield from scopes(child, name)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """The parameters of a function in the order of its signature."""
    a = node.args
    return [
        *a.posonlyargs,
        *a.args,
        *([a.vararg] if a.vararg else []),
        *a.kwonlyargs,
        *([a.kwarg] if a.kwarg else []),
    ]
