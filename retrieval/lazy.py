"""Public names of a package, imported on first use: `from retrieval import Root` does not load faiss."""

import ast
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

from retrieval.extras import extras_named


def public_names(package: str) -> Callable[[str], object]:
    """A `__getattr__` for the `__init__.py` of a package: gives the names that it imports for type checkers only.

    The function raises UserError for a name that needs a library of an extra that is not installed.

    >>> public_names("retrieval.pictures")("PictureError").__name__
    'PictureError'
    """

    def load(name: str) -> object:
        if name not in _modules(package):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with extras_named():
            return getattr(import_module(_modules(package)[name]), name)

    return load


@cache
def _modules(package: str) -> dict[str, str]:
    """The module of each name that the `__init__.py` of a package imports in an `if` at its top level."""
    tree = ast.parse(Path(str(import_module(package).__file__)).read_bytes())
    statements = (statement for block in tree.body if isinstance(block, ast.If) for statement in block.body)
    imports = (statement for statement in statements if isinstance(statement, ast.ImportFrom))
    return {alias.name: str(each.module) for each in imports for alias in each.names}
