"""A database of images by their CLIP vectors: opened from its folder, searched, never changed.

Reads what `retrieval.database.build` wrote. A query visits the partitions nearest to it, each partition's index
proposes candidates, and these are ranked by their exact similarity, so the order is right even where
the candidates are approximate. Loads no torch.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.clip.identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.index.effort import STREAMS, Effort, Measured, choose, measured
from retrieval.index.hidden import Ids, blocked_ids
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors, route, unit
from retrieval.recipe import IndexConfig
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root

SCHEMA_VERSION = 2
"""Of the files of a database; opening another version is an error."""
ORDINARY = (1e-15, 1e15)
"""Lengths of queries whose squares float32 holds."""
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Neighbors:
    """What a search found for n queries, k each, best first."""

    ids: Ids
    """(n, k) image ids."""
    similarities: Vectors
    """(n, k) inner products of unit vectors, in [-1, 1], descending."""
    positions: Positions
    """(n, k) row numbers in the database, in the order of its partitions."""
    database: "Database"

    @cached_property
    def embeddings(self) -> Vectors:
        """(n, k, dim) float32 unit rows, read when first asked for."""
        return self.database.rows_at(self.positions)[1]

    @cached_property
    def rows(self) -> list[pa.Table]:
        """For each query a table (schema.METADATA) of its k neighbors, best first; read when asked for."""
        return [self.database.metadata_at(positions) for positions in self.positions]

    def table(self) -> pa.Table:
        """All of it as one Arrow table, a row for each neighbor: `retrieval.database.answers.ANSWER` and metadata."""
        from retrieval.database.answers import answer

        return answer(self.database, self.similarities, self.positions, rows=True)


class Database:
    """An opened database. Safe to share between threads; search effort is an argument of each call."""

    def __init__(self, root: Root, manifest: Manifest, hidden: Ids) -> None:
        self.root = root
        self.manifest = manifest
        self.hidden = hidden
        """Image ids that no search returns, ascending: those in `blocked.npy` and those of `without`."""
        self.name = manifest.stage.rsplit("/", maxsplit=1)[-1]
        self.encoder = EncoderIdentity(**manifest.values["encoder"])
        self.dim = self.encoder.dim
        self.partition_rows = np.asarray(manifest.values["rows"], np.int64)
        self.partitions = [Partition(root, number, hidden) for number in range(len(self.partition_rows))]
        self._offsets = np.concatenate([[0], np.cumsum(self.partition_rows)])
        with root.local("centroids.npy") as path:
            self.centroids: Vectors = np.load(path, allow_pickle=False)

    @classmethod
    def open(cls, root: Root | str) -> "Database":
        """Open the database in a folder. Raises UserError if it is not one, is unfinished or damaged."""
        root = root if isinstance(root, Root) else Root(root)
        manifest = read_manifest(root, "")
        if "encoder" not in manifest.values or "rows" not in manifest.values:
            raise UserError(f"{root.url} holds the stage {manifest.stage!r}; a database was wanted.")
        if manifest.schema_version != SCHEMA_VERSION:
            raise UserError(
                f"{root.url} is a database of version {manifest.schema_version}, this code reads version "
                f"{SCHEMA_VERSION}. Build it again."
            )
        for shard in manifest.shards:
            for file in shard.files:
                size = root.size(file.name.removeprefix(f"{manifest.stage}/"))
                if size != file.bytes:
                    raise UserError(
                        f"{root.at(file.name)} has {size} bytes, its manifest says {file.bytes}: "
                        "the database is damaged. Build it again."
                    )
        return cls(root, manifest, blocked_ids(root))

    @classmethod
    def build(
        cls,
        root: Root | str,
        vectors: "npt.NDArray[Any] | str | os.PathLike[str]",
        metadata: "pa.Table | str | os.PathLike[str] | None" = None,
        *,
        encoder: EncoderIdentity,
        config: IndexConfig | None = None,
    ) -> "Database":
        """Build a database of vectors made anywhere, and open it. See `retrieval.imports.source.Source` for what
        vectors and metadata may be (arrays, .npy, Parquet, clip-retrieval folders), `retrieval.imports.importer` for
        how rows are checked. config: a `retrieval.recipe.IndexConfig`.
        """
        from retrieval.imports.importer import (
            build_from,  # this loads torch and autofaiss, which a search need not
        )
        from retrieval.imports.source import Source

        root = root if isinstance(root, Root) else Root(root)
        build_from(root, Source(vectors, metadata), encoder, config or IndexConfig.model_validate({}))
        return cls.open(root)

    def without(self, ids: npt.ArrayLike) -> "Database":
        """The same database with these image ids hidden too, for whoever holds the result."""
        more = np.asarray(ids, np.int64).reshape(-1)
        return Database(self.root, self.manifest, np.union1d(self.hidden, more))

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def first_position(self, number: int) -> int:
        """The row number in the database of a partition's first row."""
        return int(self._offsets[number])

    def ids_at(self, positions: Positions) -> Ids:
        """Image ids (...) int64 of rows by number (...)."""
        if len(self.partitions) == 1:
            return np.asarray(self.partitions[0].ids[positions])
        ids = np.empty(positions.size, np.int64)
        for number, here, rows in self._by_partition(positions):
            ids[here] = self.partitions[number].ids[rows]
        return ids.reshape(positions.shape)

    def rows_at(self, positions: Positions) -> tuple[Ids, Vectors]:
        """Image ids (...) int64 and unit vectors (..., dim) float32 of rows by number (...)."""
        embeddings = np.empty((positions.size, self.dim), np.float32)
        for number, here, rows in self._by_partition(positions):
            embeddings[here] = self.partitions[number].embeddings[rows]
        return self.ids_at(positions), unit(embeddings).reshape(*positions.shape, self.dim)

    def metadata_at(self, positions: Positions) -> pa.Table:
        """Metadata (schema.METADATA, perhaps DETAILS) of rows by number (n,), in the order asked for."""
        first = self.partitions[0].metadata.schema.empty_table()
        parts, places = [first], [np.empty(0, np.int64)]
        for number, here, rows in self._by_partition(positions):
            parts.append(self.partitions[number].metadata.take(pa.array(rows)))
            places.append(here)
        back = np.argsort(np.concatenate(places), kind="stable")
        return pa.concat_tables(parts).take(pa.array(back)).combine_chunks()

    def require_encoder(self, identity: EncoderIdentity) -> None:
        """Raises UserError unless this database was built by the encoder of that identity."""
        if self.encoder != identity:
            raise UserError(
                f"database {self.root.url} was built by the encoder {self.encoder.model} "
                f"({self.encoder.weights}), this is {identity.model} ({identity.weights}). "
                "Build it again with this encoder, or set [clip] to the other one."
            )

    def effort(self, recall: float, like: str = "images") -> Effort:
        """The cheapest effort that reached a recall when this database was calibrated.

        like: whether queries are like its images or are texts. Without a calibration for texts, twice
        the partitions and lists of the one for images.
        """
        if like not in STREAMS:
            raise UserError(f"queries are like one of {', '.join(STREAMS)}, got {like!r}")
        if like in self._calibration:
            return choose(self._calibration[like], recall)
        effort = choose(self._calibration["images"], recall)
        return Effort(min(2 * effort.probes, len(self.partitions)), 2 * effort.lists, effort.candidates)

    @cached_property
    def _calibration(self) -> dict[str, list[Measured]]:
        streams = self.manifest.values["calibration"]
        return {like: [measured(line) for line in lines] for like, lines in streams.items()}

    def search(
        self, queries: npt.ArrayLike, k: int, *, recall: float = 0.95, effort: Effort | None = None
    ) -> Neighbors:
        """The k rows most similar to each query. queries: (n, dim) of any float type and any length > 0.

        recall: the share of the true k that is wanted on average, mapped to an effort by the calibration
        in the manifest; an effort given goes before it. Fewer than k results only where the database
        shows fewer rows. Equal similarities come in the order of their positions across partitions.
        Raises UserError for k < 1 and for queries of another dimension, zero or not finite.
        """
        units = self.checked(queries, k)
        effort = effort or self.effort(recall)
        visits = self.route(units, k, effort)
        similarities, positions = self.search_partitions(units, k, effort, visits)
        return self.neighbors(similarities, positions)

    def neighbors(self, similarities: Vectors, positions: Positions) -> Neighbors:
        """Results as `search` returns them, of rows (n, k) that may end in similarity -inf."""
        found = similarities.shape[1]
        if not np.isfinite(similarities[:, -1:]).all():
            found = int(np.isfinite(similarities).sum(axis=1).max(initial=0))
        return Neighbors(
            self.ids_at(positions[:, :found]), similarities[:, :found], positions[:, :found], self
        )

    def checked(self, queries: npt.ArrayLike, k: int) -> Vectors:
        """The queries as float32 unit rows; raises UserError where they, or k, cannot be searched."""
        array = np.asarray(queries)
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        if array.ndim != 2 or array.shape[1] != self.dim:
            raise UserError(f"queries for {self.root.url} must be (n, {self.dim}), got {array.shape}")
        if array.dtype.kind not in "fiu":
            raise UserError(f"queries for {self.root.url} must be numbers, got {array.dtype}")
        array = array.astype(np.float32)
        lengths = np.sqrt(np.einsum("ij,ij->i", array, array))
        if ((lengths > ORDINARY[0]) & (lengths < ORDINARY[1])).all():
            return array / lengths[:, None]
        largest = np.abs(array).max(axis=1, keepdims=True, initial=0)
        if not np.isfinite(largest).all() or not largest.all():
            raise UserError(f"a query for {self.root.url} is zero or not finite: no direction to search")
        return unit(array / largest)  # scaled first: squares of very large or small numbers leave float32

    def route(self, units: Vectors, k: int, effort: Effort) -> Positions:
        """Partitions each query visits, nearest first: (n, most visited) int64, -1 for none.

        These are effort.probes, and as many more as it takes to hold k rows that are not hidden.
        """
        if len(self.partitions) == 1:
            return np.zeros((len(units), 1), np.int64)
        order = route(units, self.centroids, len(self.partitions))
        seen = np.cumsum(self.partition_rows[order], axis=1)
        needed = np.maximum(effort.probes, 1 + (seen < k + len(self.hidden)).sum(axis=1))
        visits = np.where(np.arange(order.shape[1]) < needed[:, None], order, -1)
        return visits[:, : min(needed.max(initial=1), order.shape[1])]

    def search_partitions(
        self,
        units: Vectors,
        k: int,
        effort: Effort,
        visits: Positions,
        numbers: npt.ArrayLike | None = None,
    ) -> tuple[Vectors, Positions]:
        """The k best rows within the partitions `numbers` (by default all) among those visited.

        Returns similarities and positions (n, k), best first, (-inf, -1) behind the last one found.
        """
        if len(self.partitions) == 1:
            return self.partitions[0].search(units, k, effort) if len(units) else _nothing(0, 0)
        wanted = np.arange(len(self.partitions)) if numbers is None else np.asarray(numbers)
        wanted = np.intersect1d(wanted[self.partition_rows[wanted] > 0], visits)
        k = min(k, len(self))
        similarities, positions = _nothing(len(units), k)
        for number in wanted:
            asking = np.flatnonzero((visits == number).any(axis=1))
            found, rows = self.partitions[number].search(units[asking], k, effort)
            where = np.where(rows < 0, -1, rows + self._offsets[number])
            similarities[asking], positions[asking] = best_of(
                np.concatenate([similarities[asking], found], axis=1),
                np.concatenate([positions[asking], where], axis=1),
                k,
            )
        return similarities, positions

    def embeddings(self) -> npt.NDArray[np.float16]:
        """All vectors, (rows, dim) float16, in the order of the partitions."""
        return np.concatenate([partition.embeddings for partition in self.partitions])

    def metadata(self) -> pa.Table:
        """All metadata rows (schema.METADATA) in the same order."""
        return pa.concat_tables([partition.metadata for partition in self.partitions])

    def _by_partition(self, positions: Positions) -> list[tuple[int, Any, Any]]:
        """For each partition that holds some: its number, places in the flattened positions, its rows."""
        flat = positions.reshape(-1)
        numbers = np.searchsorted(self._offsets, flat, side="right") - 1
        return [
            (int(number), here := np.flatnonzero(numbers == number), flat[here] - self._offsets[number])
            for number in np.unique(numbers)
        ]


def best_of(similarities: Vectors, positions: Positions, k: int) -> tuple[Vectors, Positions]:
    """The k best columns of each row, best first, equal ones in the order of their positions."""
    order = np.lexsort((positions, -similarities), axis=1)[:, :k]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(positions, order, 1)


def _nothing(queries: int, k: int) -> tuple[Vectors, Positions]:
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)
