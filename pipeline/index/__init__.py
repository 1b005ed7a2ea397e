"""The stage `index`: builds the training database from the vectors of `embed`, or of another tool."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.index.index import run

__getattr__ = public_names(__name__)
