"""img2dataset's downloader, without the rest of img2dataset.

Reads and writes nothing. The package's own import brings torch, Ray and albumentations, 670 MB and six
seconds in each worker, for its command line and its resizer; the module that we use needs none of these.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGE = "img2dataset"


def _downloader() -> ModuleType:
    """The module `img2dataset.downloader`, below a package that is not run and does not stay."""
    if PACKAGE in sys.modules:
        return import_module(f"{PACKAGE}.downloader")
    spec = find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {PACKAGE!r}", name=PACKAGE)
    package = ModuleType(PACKAGE)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[PACKAGE] = package
    try:
        return import_module(f"{PACKAGE}.downloader")
    finally:
        del sys.modules[PACKAGE]


downloader: Any = _downloader()
