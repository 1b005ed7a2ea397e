"""Updates of finished databases: rows are added or deleted, databases are merged. Nothing is encoded again."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.updates.add import add_to_database
    from retrieval.updates.delete import delete_from_database
    from retrieval.updates.merge import merge_databases

__getattr__ = public_names(__name__)
