"""A second check of an erasure, after `ids_left.py`: vectors of the erased rows are searched in the databases that
held them, before and after.

Reads the databases; writes `optout/<list>/vectors.npz`, because the rows with the vectors are gone afterwards. The file
is deleted with the other temporary files of the list. Hidden rows are searched too.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pipeline.optout.search import Listed
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.storage.root import Root

MAX_VECTORS = 100
"""Most vectors of each database that are searched; of more erased rows, an even sample."""
NEIGHBORS = 100
"""Rows that a search returns: copies of a picture can be as similar to a vector as the erased row itself."""

Search = dict[str, dict[str, int]]
"""By database: its `erased` rows, the `vectors` searched, and how many of them found an erased row `found_before` and
`found_after` the erasure."""


def search_before(root: Root, folder: str, rows: Mapping[str, Listed]) -> Search:
    """Store vectors of the rows that are to be erased in `folder`, and search them. rows: by database."""
    listed = {database: found for database, found in rows.items() if len(found.ids)}
    vectors = {database: _vectors(root, database, found) for database, found in listed.items()}
    with root.writing(_file(folder)) as pending, pending.path.open("wb") as file:
        np.savez(file, **vectors)
    search: Search = {}
    for database, found in listed.items():
        queries = _queries(vectors, vectors[database].shape[1])
        before = _num_found(root, database, queries, found.ids)
        search[database] = {"erased": len(found.ids), "vectors": len(queries), "found_before": before}
    return search


def search_after(root: Root, folder: str, rows: Mapping[str, list[int]]) -> dict[str, int]:
    """By database, the number of stored vectors that find an erased row; empty if no vectors are stored.

    rows: ids of these rows by database.
    """
    if not root.exists(_file(folder)):  # a plan of an earlier version, or one whose deletion was interrupted there
        return {}
    with root.local(_file(folder)) as path, np.load(path, allow_pickle=False) as file:
        vectors = dict(file)
    return {
        database: _num_found(root, database, _queries(vectors, own.shape[1]), np.array(rows[database], np.int64))
        for database, own in vectors.items()
    }


def check_erasure(root: Root, left: Mapping[str, int], search: Search) -> None:
    """Raises UserError if rows with erased ids are left, or if a search found erased rows.

    left: from `ids_left`.
    """
    found = {database: counts["found_after"] for database, counts in search.items() if counts.get("found_after")}
    if found or any(left.values()):
        raise UserError(
            f"{root.url}: after the erasure, rows with erased ids are left in {_counts(left)}; searches with vectors of"
            f" erased rows return such a row in {_counts(found)}; expected none. Run this command again with the same"
            " list: it erases them again. If the numbers stay, make these stages again with --remake. Until then"
            " updates of the databases are refused."
        )


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({number:,})" for name, number in numbers.items() if number) or "no stage"


def _file(folder: str) -> str:
    return f"{folder}/vectors.npz"


def _vectors(root: Root, folder: str, found: Listed) -> npt.NDArray[np.float16]:
    """Vectors (n, dim) of at most MAX_VECTORS of the rows that were found in a database, of as many partitions."""
    database = Database.open(root.child(folder))
    names = found.shards[_spread(len(found.shards), MAX_VECTORS)]
    parts = []
    for name in names:
        partition = database.open_partition(int(name.rpartition("/")[2]))
        rows = np.flatnonzero(np.isin(partition.ids, found.ids))
        parts.append(partition.embeddings[rows[_spread(len(rows), -(-MAX_VECTORS // len(names)))]])
    return np.concatenate(parts)[:MAX_VECTORS]


def _spread(size: int, count: int) -> slice:
    """The slice of a sequence with at most `count` items at equal distances. size: of the sequence."""
    return slice(None, None, max(1, -(-size // count)))


def _queries(vectors: Mapping[str, npt.NDArray[np.float16]], dim: int) -> npt.NDArray[np.float16]:
    """The vectors of all databases with this number of dimensions."""
    return np.concatenate([part for part in vectors.values() if part.shape[1] == dim])


def _num_found(root: Root, folder: str, queries: npt.NDArray[np.float16], ids: npt.NDArray[np.int64]) -> int:
    """The number of queries whose results in a database have one of the ids."""
    database = Database.open(root.child(folder)).with_all_rows()
    return int(np.isin(database.search(queries, NEIGHBORS).ids, ids).any(axis=1).sum())
