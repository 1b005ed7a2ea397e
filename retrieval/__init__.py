"""Retrieval of images by CLIP vectors: `Database`, and `Encoder` in `retrieval.clip`."""

from typing import TYPE_CHECKING

from retrieval.errors import UserError
from retrieval.lazy import public_names
from retrieval.storage.root import Root

if TYPE_CHECKING:
    from retrieval.database.database import Database, Neighbors
    from retrieval.index.effort import Effort

__all__ = ["Database", "Effort", "Neighbors", "Root", "UserError"]

__getattr__ = public_names(
    __name__,
    {"Database": "database.database", "Effort": "index.effort", "Neighbors": "database.database"},
)
