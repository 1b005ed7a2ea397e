"""A searchable database of images by their CLIP vectors. Searching never changes it and does not load torch.

A query visits the partitions nearest to it. The index of each partition proposes candidates, which are then ranked by
exact similarity: a neighbor may be missing, but the order is exact.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from retrieval.clip.identity import EncoderIdentity
from retrieval.database.efforts import Efforts
from retrieval.database.one_opened import MAX_OPENED, OneOpened
from retrieval.database.result_table import result_table
from retrieval.database.stored_calibration import read_calibrations
from retrieval.database.stored_manifest import stored_manifest
from retrieval.database.unit_rows import unit_queries, whole_k
from retrieval.errors import UserError
from retrieval.extras import check_faiss
from retrieval.file_cache import FileCache
from retrieval.index.conditions import Expression, parse_condition
from retrieval.index.effort import Effort, MeasuredEffort
from retrieval.index.hidden import Ids, as_ids, hidden_ids
from retrieval.index.partition import Partition
from retrieval.index.partition_files import load_array, load_file
from retrieval.index.routing import Numbers, Vectors, file_records, route, stored_folders, unit
from retrieval.index.top_k import Positions, empty_top_k, is_complete, merge_top_k
from retrieval.storage.arrow_columns import take_rows
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root

MAX_VIEWS = 16
"""Conditions whose rows are kept, for each database."""


@dataclass(frozen=True)
class Neighbors:
    """Results of a search: k neighbors of each of n queries, best first."""

    ids: Ids
    """(n, k) int64 image ids."""
    similarities: Vectors
    """(n, k) float32 inner products of unit vectors, in [-1, 1], descending."""
    positions: Positions
    """(n, k) int64 row numbers in the database, in the order of its partitions."""
    database: "Database"

    @cached_property
    def embeddings(self) -> Vectors:
        """(n, k, dim) float32 unit rows, read on first use."""
        return self.database.rows_at(self.positions)[1]

    @cached_property
    def norms(self) -> Vectors:
        """(n, k) float32 lengths of the CLIP vectors before normalization, NaN if unknown; read on first use."""
        return self.database.norms_at(self.positions)

    @cached_property
    def rows(self) -> list[pa.Table]:
        """A table (schema.METADATA) of the k neighbors of each query, best first; read on first use."""
        return [self.database.metadata_at(positions) for positions in self.positions]

    def table(self) -> pa.Table:
        """All results as one Arrow table with a row for each neighbor: RESULT_SCHEMA, then the metadata."""
        return self.database.result_table(self.similarities, self.positions, metadata=True)


class Database:
    """An opened database. Safe to share between threads: every search gets its effort as an argument."""

    def __init__(self, root: Root, manifest: Manifest, hidden: Ids, cache: tuple[str, float] = ("", 0.0)) -> None:
        self.root = root
        self.source = (root, *cache)  # arguments of `open`
        self.files = FileCache(root, *cache, file_records(manifest))
        self.manifest = manifest
        self.hidden = hidden
        """Image ids that no search returns, ascending: the permanently hidden ones and those of `without`."""
        self.condition: Expression | None = None
        """Other rows than those that meet it are hidden too."""
        self.name = manifest.stage.rsplit("/", maxsplit=1)[-1]
        self.encoder = EncoderIdentity(**manifest.values["encoder"])
        self.dim = self.encoder.dim
        self.partition_rows = np.asarray(manifest.values["rows"], np.int64)
        self._folders = stored_folders(manifest)
        self.partitions: Sequence[Partition] = [*map(self.open_partition, range(len(self._folders)))]
        self._warned: set[str] = set()
        self._offsets = np.concatenate([[0], np.cumsum(self.partition_rows)])
        self.centroids: Vectors = load_file(self.files, "centroids.npy", load_array)

    @classmethod
    def open(cls, root: Root | str, cache_folder: str = "", cache_gb: float = 0.0) -> "Database":
        """Open the database in a folder. Raises UserError if it is no database, unfinished or damaged.

        Files of an object store are copied to cache_folder on first use; processes share it. cache_gb: its largest
        size, without deleted copies that opened databases still map. Empty and 0: those of `root.cache`, by default a
        folder among the temporary files, and half of the free disk space.
        """
        check_faiss()
        root = root if isinstance(root, Root) else Root(root)
        return cls(root, stored_manifest(root), hidden_ids(root), (cache_folder, cache_gb))

    def open_partition(self, number: int) -> Partition:
        """A partition with files of its own, which are closed with it and not with the database."""
        return Partition.open(self.files, self._folders[number], self.dim, self.hidden, self.condition)

    def without(self, ids: npt.ArrayLike) -> "Database":
        """This database with more image ids hidden, in the returned object only. Both share all opened files.

        ids: of any shape, also ids that it does not contain. Raises UserError for ids that are no integers.
        """
        return self._hiding(np.union1d(self.hidden, as_ids(ids)), self.condition)

    def with_all_rows(self) -> "Database":
        """This database with no row hidden, in the returned object only."""
        return self._hiding(np.empty(0, np.int64), None)

    def for_passes(self) -> "Database":
        """This database for passes over all partitions: if there are more than MAX_OPENED, one is open at a time."""
        other = copy.copy(self)
        if len(self.partitions) > MAX_OPENED:
            other.partitions = OneOpened(len(self._folders), self.open_partition)
        return other

    def where(self, condition: Expression | str, parse: Callable[[str], Expression] = parse_condition) -> "Database":
        """This database with only the rows that meet a condition. Both share all opened files.

        condition: an Arrow expression over the columns of `metadata_at`, or a text for `parse`. Rows where its value is
        null do not meet it. A later condition is added to an earlier one. The condition is evaluated once for each
        partition, so keep the result for more searches; that of a text is kept. Raises UserError for what is no
        condition. Searches raise it for unknown columns and for values of another type.
        """
        if isinstance(condition, str):
            view = self._views.get((condition, parse))  # another thread may clear them
            if view is None:
                if len(self._views) >= MAX_VIEWS:
                    self._views.clear()
                view = self._views.setdefault((condition, parse), self.where(parse(condition)))
            return view
        if not isinstance(condition, pc.Expression):
            raise UserError(f"a condition is a text or a pyarrow.compute.Expression, got {type(condition).__name__}")
        combined = condition if self.condition is None else self.condition & condition
        return self._hiding(self.hidden, combined)

    def _hiding(self, hidden: Ids, condition: Expression | None) -> "Database":
        other = copy.copy(self)
        other.hidden, other.condition = hidden, condition
        other.partitions = [Partition(partition.files, hidden, condition) for partition in self.partitions]
        for name in ("hidden_rows", "_chosen", "_views"):
            other.__dict__.pop(name, None)
        return other

    @cached_property
    def _views(self) -> dict[tuple[str, Callable[[str], Expression]], "Database"]:
        """Databases by the text of their condition and the function that parses it."""
        return {}

    @cached_property
    def hidden_rows(self) -> Numbers:
        """Number of hidden rows in each partition, (partitions,). Reads the metadata of all rows if any is hidden."""
        if not len(self.hidden) and self.condition is None:
            return np.zeros(len(self.partitions), np.int64)
        return np.array([partition.num_hidden for partition in self.partitions], np.int64)

    @cached_property
    def most_lists(self) -> int:
        """Inverted lists of the partition with the most. Opens the index of every partition."""
        filled = np.flatnonzero(self.partition_rows).tolist()
        return max((self.partitions[number].num_lists for number in filled), default=1)

    @property
    def is_exact(self) -> bool:
        """Whether every search compares all rows: one partition without an index."""
        return len(self.partitions) == 1 and (not len(self) or self.partitions[0].is_flat)

    def __len__(self) -> int:
        return self._offsets.item(-1)

    def first_position(self, number: int) -> int:
        """Position in the database of the first row of a partition."""
        return int(self._offsets[number])

    def partition_numbers(self, positions: Positions) -> Positions:
        """The partition of each row by position (...)."""
        return np.searchsorted(self._offsets, positions, side="right") - 1

    def ids_at(self, positions: Positions) -> Ids:
        """Image ids (...) int64 of rows by position (...)."""
        if len(self.partitions) == 1:
            return self.partitions[0].ids.take(positions)
        ids = np.empty(positions.size, np.int64)
        for number, index, rows in self._by_partition(positions):
            ids[index] = self.partitions[number].ids[rows]
        return ids.reshape(positions.shape)

    def rows_at(self, positions: Positions) -> tuple[Ids, Vectors]:
        """Image ids (...) int64 and unit vectors (..., dim) float32 of rows by position (...)."""
        embeddings = np.empty((positions.size, self.dim), np.float32)
        for number, index, rows in self._by_partition(positions):
            embeddings[index] = self.partitions[number].embeddings[rows]
        return self.ids_at(positions), unit(embeddings).reshape(*positions.shape, self.dim)

    def norms_at(self, positions: Positions) -> Vectors:
        """Lengths (...) float32 of the CLIP vectors of rows by position (...), NaN if unknown."""
        norms = np.empty(positions.size, np.float32)
        for number, index, rows in self._by_partition(positions):
            norms[index] = self.partitions[number].norms[rows]
        return norms.reshape(positions.shape)

    def metadata_at(self, positions: Positions) -> pa.Table:
        """Metadata of rows by position (n,), in this order: schema.METADATA, and DETAILS where stored."""
        parts, indices = [], []
        for number, index, rows in self._by_partition(positions):
            parts.append(take_rows(self.partitions[number].metadata, rows))
            indices.append(index)
        if not parts:
            return self.partitions[0].metadata.schema.empty_table()
        if len(parts) == 1:  # in order
            return parts[0].combine_chunks()
        order = np.argsort(np.concatenate(indices), kind="stable")
        return take_rows(pa.concat_tables(parts), order).combine_chunks()

    def result_table(self, similarities: Vectors, positions: Positions, metadata: bool) -> pa.Table:
        """Results (n, k) of `search_partitions` as a table of RESULT_SCHEMA, with metadata on request."""
        rows = positions[positions >= 0]
        columns = self.metadata_at(rows) if metadata else None
        return result_table(similarities, positions, self.ids_at(rows), columns)

    def require_encoder(self, identity: EncoderIdentity) -> None:
        """Raises UserError unless the vectors of this database come from the encoder of this identity."""
        if self.encoder != identity:
            raise UserError(
                f"database {self.root.url} was built with the encoder {self.encoder.model} "
                f"(weights {self.encoder.weights}); the present encoder is {identity.model} "
                f"(weights {identity.weights}). Set [clip] to the former, or build the database again."
            )

    @cached_property
    def calibration(self) -> dict[str, list[MeasuredEffort]]:
        """The measured efforts for each kind of queries."""
        return read_calibrations(self.root, self.manifest)

    def effort(self, recall: float, like: str = "images", k: int = 20) -> Effort:
        """The cheapest effort that reached a recall of k neighbors in the calibration. like: "images" or "texts".

        Without a calibration for texts: a safe effort. Warns (RecallWarning, once) in this case, for a k beyond
        those that were measured, and where only comparing all rows reached the recall: see `efforts.Efforts`.
        Raises UserError for a recall that is not in (0, 1] and for another `like`.
        """
        return self._chosen.effort(recall, like, min(k, len(self)))

    @cached_property
    def _chosen(self) -> Efforts:
        return Efforts(self.root.url, self.calibration, self.partition_rows, self.hidden_rows, self._warned)

    def search(
        self,
        queries: npt.ArrayLike,
        k: int,
        *,
        recall: float = 0.95,
        like: str = "images",
        effort: Effort | None = None,
    ) -> Neighbors:
        """The k rows most similar to each query. queries: (n, dim) numbers of any length > 0: an array, a
        tensor of torch or nested lists.

        recall: wanted share of the true k neighbors, on average over new queries; the calibration of the database
        maps it to an effort. like: the kind of the queries, "images" or "texts"; texts need more effort. effort:
        used instead of both. Returns fewer than k neighbors only if fewer rows are visible. Equal similarities
        from different partitions are ordered by position. Warns and raises as `effort`. Raises UserError for k < 1
        and for queries of another dimension, zero or not finite.
        """
        units = self.unit_queries(queries, k)
        k = min(int(k), len(self))
        effort = effort or self.effort(recall, like, k)
        return self.neighbors(*self.search_partitions(units, k, effort, self.route(units, k, effort)))

    def neighbors(self, similarities: Vectors, positions: Positions) -> Neighbors:
        """Results (n, k) as `search` returns them, without the columns that are -inf for all queries."""
        if not is_complete(positions):
            count = int(np.isfinite(similarities).sum(axis=1).max(initial=0))
            similarities, positions = similarities[:, :count], positions[:, :count]
        return Neighbors(self.ids_at(positions), similarities, positions, self)

    def unit_queries(self, queries: npt.ArrayLike, k: int) -> Vectors:
        """The queries as float32 unit rows. Raises UserError if they cannot be searched, or for k < 1."""
        whole_k(k)
        return unit_queries(queries, self.dim, self.root.url)

    def route(self, units: Vectors, k: int, effort: Effort) -> Positions:
        """Partitions each query visits, nearest first: (n, most visited) int64, -1 for none.

        A query visits effort.partitions_per_query, and more until these certainly have k visible rows.
        """
        if len(self.partitions) == 1:
            return np.zeros((len(units), 1), np.int64)
        order = route(units, self.centroids, len(self.partitions))
        needed = 1 + (np.cumsum((self.partition_rows - self.hidden_rows)[order], axis=1) < k).sum(axis=1)
        needed = np.maximum(effort.partitions_per_query, needed)
        visits = np.where(np.arange(order.shape[1]) < needed[:, None], order, -1)
        return visits[:, : min(needed.max(initial=1), order.shape[1])]

    def search_partitions(
        self, units: Vectors, k: int, effort: Effort, visits: Positions, numbers: npt.ArrayLike | None = None
    ) -> tuple[Vectors, Positions]:
        """The k best rows in the visited partitions; numbers: only in these partitions (default: all).

        Returns similarities and positions (n, k), best first, (-inf, -1) where there are fewer.
        """
        if len(self.partitions) == 1:
            # Rows may all have been erased later.
            return self.partitions[0].search(units, k, effort) if len(units) and k else empty_top_k(len(units), 0)
        searched = np.arange(len(self.partitions)) if numbers is None else np.asarray(numbers)
        searched = np.intersect1d(searched[self.partition_rows[searched] > 0], visits)
        k = min(k, len(self))
        similarities, positions = empty_top_k(len(units), k)
        for number in searched:
            visitors = np.flatnonzero((visits == number).any(axis=1))
            best, rows = self.partitions[number].search(units[visitors], k, effort)
            partition_results = best, np.where(rows < 0, -1, rows + self._offsets[number])
            earlier = similarities[visitors], positions[visitors]
            similarities[visitors], positions[visitors] = merge_top_k(earlier, partition_results, k)
        return similarities, positions

    def embeddings(self) -> npt.NDArray[np.float16]:
        """All vectors, (rows, dim) float16, in the order of the partitions."""
        return np.concatenate([partition.embeddings[:] for partition in self.partitions])

    def metadata(self) -> pa.Table:
        """All metadata rows (schema.METADATA) in the same order."""
        return pa.concat_tables([partition.metadata for partition in self.partitions])

    def _by_partition(self, positions: Positions) -> list[tuple[int, Any, Any]]:
        """For each partition with some of the rows: its number, indices into the flat positions, its rows."""
        flat = positions.reshape(-1)
        numbers = self.partition_numbers(flat)
        return [
            (int(number), index := np.flatnonzero(numbers == number), flat[index] - self._offsets[number])
            for number in np.unique(numbers)
        ]
