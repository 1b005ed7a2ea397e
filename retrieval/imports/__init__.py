"""Imports: reads vectors and metadata of other tools and builds a database from them."""

from typing import TYPE_CHECKING

from retrieval.imports.source import SourceColumns, VectorSource
from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.imports.importer import build_database

__getattr__ = public_names(__name__)
