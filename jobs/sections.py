"""The classes of a recipe's sections as their source declares them, without what the stages import.

`declared("pipeline.filter.FilterConfig")` reads the source of that class and of those it is made of: fields,
defaults, limits, marks, no methods. A command that only looks must not wait for torch, ray and faiss.
"""

import ast
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from retrieval.config import Config

PACKAGES = ("retrieval", "pipeline", "trainer", "jobs")
LIGHT = {*sys.stdlib_module_names, "pydantic", "retrieval.config", "retrieval.errors"}
"""Modules that are imported as they are."""
FOLDER = Path(__file__).resolve().parents[1]

Statement = ast.Import | ast.ImportFrom | ast.ClassDef | ast.Assign | ast.AnnAssign


def declared(place: str) -> type[Config]:
    """The configuration class of a dotted name: it checks like the real one, but for its validators."""
    module, _, name = place.rpartition(".")
    kind: type[Config] = _source(module).value(name)
    return kind


class _Source:
    """A module of ours, of which only the wanted names are evaluated."""

    def __init__(self, module: str) -> None:
        self.path = FOLDER / f"{module.replace('.', '/')}.py"
        self.statements = {
            name: statement
            for statement in ast.parse(self.path.read_text()).body
            if isinstance(statement, Statement)
            for name in _bound(statement)
        }
        self.values: dict[str, Any] = {"__name__": module}

    def value(self, name: str) -> Any:
        """What a name stands for in this module; None for what only a heavy library knows."""
        if name in self.statements and name not in self.values:
            self.values[name] = None  # until it is known: a name may stand in its own definition
            self._evaluate(name, self.statements[name])
        return self.values.get(name)

    def _evaluate(self, name: str, statement: Statement) -> None:
        if isinstance(statement, ast.Import):
            if name in LIGHT:
                self.values[name] = import_module(name)
        elif isinstance(statement, ast.ImportFrom):
            self.values[name] = _imported(statement, name)
        else:
            if isinstance(statement, ast.ClassDef):
                statement = _without_methods(statement)
            for node in ast.walk(statement):
                if isinstance(node, ast.Name):
                    self.value(node.id)
            exec(compile(ast.Module([statement], []), str(self.path), "exec"), self.values)


@cache
def _source(module: str) -> _Source:
    return _Source(module)


def _bound(statement: Statement) -> list[str]:
    """Names that a statement gives a meaning."""
    if isinstance(statement, ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _imported(statement: ast.ImportFrom, name: str) -> Any:
    module = statement.module or ""
    [original] = [alias.name for alias in statement.names if (alias.asname or alias.name) == name]
    if module in LIGHT or module.partition(".")[0] in sys.stdlib_module_names:
        return getattr(import_module(module), original)
    return _source(module).value(original) if module.partition(".")[0] in PACKAGES else None


def _without_methods(statement: ast.ClassDef) -> ast.ClassDef:
    body = [node for node in statement.body if not isinstance(node, ast.FunctionDef)]
    return ast.ClassDef(
        name=statement.name,
        bases=statement.bases,
        keywords=statement.keywords,
        body=body or [ast.Pass(lineno=statement.lineno, col_offset=0)],
        decorator_list=statement.decorator_list,
        lineno=statement.lineno,
        col_offset=statement.col_offset,
    )
