"""Public names of a package that are imported when they are first used.

`from retrieval import Database` works, and reading a manifest does not wait for faiss or torch.
"""

from collections.abc import Callable
from importlib import import_module


def public_names(package: str, modules: dict[str, str]) -> Callable[[str], object]:
    """A `__getattr__` for the `__init__.py` of a package. modules: module of each public name, both relative.

    >>> public_names("retrieval", {"UserError": "errors"})("UserError").__name__
    'UserError'
    """

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return load
