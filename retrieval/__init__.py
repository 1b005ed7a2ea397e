"""Retrieval of images by CLIP vectors: databases here, the encoder in `retrieval.clip`."""

from typing import TYPE_CHECKING

from retrieval.clip.identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.lazy import public_names
from retrieval.storage.root import Root

if TYPE_CHECKING:
    from retrieval.database.database import Database, Neighbors
    from retrieval.imports.importer import build_database
    from retrieval.index.effort import Effort
    from retrieval.updates.add import add_to_database
    from retrieval.updates.delete import delete_from_database
    from retrieval.updates.merge import merge_databases

__getattr__ = public_names(__name__)
