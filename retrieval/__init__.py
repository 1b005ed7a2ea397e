"""Retrieval of images by CLIP vectors: `Database`, and `Encoder` in `retrieval.encoder`."""

from importlib import import_module
from typing import TYPE_CHECKING

from retrieval.errors import UserError
from retrieval.storage import Root

if TYPE_CHECKING:
    from retrieval.database import Database, Neighbors
    from retrieval.effort import Effort

__all__ = ["Database", "Effort", "Neighbors", "Root", "UserError"]

_PLACES = {"Database": "database", "Effort": "effort", "Neighbors": "database"}


def __getattr__(name: str) -> object:
    """What needs faiss is imported when it is asked for: who reads a manifest does not wait for it."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
