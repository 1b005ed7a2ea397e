"""Retrieval of images by CLIP vectors: `Database`, and `Encoder` in `retrieval.encoder`."""

from retrieval.database import Database, Neighbors
from retrieval.effort import Effort
from retrieval.errors import UserError
from retrieval.storage import Root

__all__ = ["Database", "Effort", "Neighbors", "Root", "UserError"]
