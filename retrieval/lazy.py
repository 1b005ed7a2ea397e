"""Public names of a package, imported on first use: `from retrieval import Root` does not load faiss."""

from collections.abc import Callable
from importlib import import_module

from retrieval.extras import extras_named


def public_names(package: str, modules: dict[str, str]) -> Callable[[str], object]:
    """A `__getattr__` for the `__init__.py` of a package.

    modules: the public names of each module, with blanks between them; modules relative to the package. The
    function raises UserError for a name that needs a library of an extra that is not installed.

    >>> public_names("retrieval", {"errors": "UserError"})("UserError").__name__
    'UserError'
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with extras_named():
            return getattr(import_module(f"{package}.{module_of[name]}"), name)

    return load
