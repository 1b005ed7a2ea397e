"""A database of images by their CLIP vectors: opened from its folder, searched, never changed.

Reads what `retrieval.build` wrote. A query visits the partitions nearest to it, each partition's faiss
index proposes candidates, and these are ranked by their exact similarity, so the order is right even
where the candidates are approximate. Loads no torch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval import schema
from retrieval.encoder_identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.manifest import Manifest, read_manifest
from retrieval.partition import Vectors, partition_folder, route, unit
from retrieval.storage import Root

CANDIDATES_PER_RESULT = 4
"""Candidates that an approximate index proposes for each wanted result, before the exact ranking."""


@dataclass(frozen=True)
class Neighbors:
    """What a search found for n queries, k each, best first."""

    ids: npt.NDArray[np.int64]
    """(n, k) image ids."""
    similarities: npt.NDArray[np.float32]
    """(n, k) inner products of unit vectors, in [-1, 1], descending."""
    embeddings: Vectors
    """(n, k, dim) unit rows."""
    positions: npt.NDArray[np.int64]
    """(n, k) row numbers in the database, in the order of its partitions."""
    database: "Database"

    @property
    def rows(self) -> list[pa.Table]:
        """For each query a table (schema.METADATA) of its k neighbors, best first."""
        return [self.database.metadata_at(positions) for positions in self.positions]


class Partition:
    """One partition: its vectors, metadata and index; mapped from a local disk, read from elsewhere."""

    def __init__(self, root: Root, number: int) -> None:
        self._root = root
        self._folder = partition_folder(number)

    @cached_property
    def embeddings(self) -> npt.NDArray[np.float16]:
        """(rows, dim) float16 unit rows."""
        with self._root.local(f"{self._folder}/embeddings.npy") as path:
            return np.load(path, mmap_mode="r" if self._root.is_local else None, allow_pickle=False)

    @cached_property
    def metadata(self) -> pa.Table:
        """schema.METADATA, in the order of the embeddings."""
        with self._root.local(f"{self._folder}/metadata.arrow") as path:
            source = pa.memory_map(str(path)) if self._root.is_local else pa.py_buffer(path.read_bytes())
            return schema.check(pa.ipc.open_file(source).read_all(), schema.METADATA, self._folder)

    @cached_property
    def ids(self) -> npt.NDArray[np.int64]:
        """(rows,) image ids."""
        return np.asarray(self.metadata[schema.IMAGE_ID].to_numpy())

    @cached_property
    def _index(self) -> Any:
        with self._root.local(f"{self._folder}/index.faiss") as path:
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if self._root.is_local else 0)

    def search(self, queries: Vectors, k: int) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Exact similarities and row numbers of the best candidates, best first, each (n, min(k, rows))."""
        k = min(k, len(self.embeddings))
        wanted = min(len(self.embeddings), k * CANDIDATES_PER_RESULT)
        _, rows = self._index.search(queries, wanted)
        exact = np.empty(rows.shape, np.float32)
        for i, query in enumerate(queries):
            if (
                rows[i].min() < 0
            ):  # the lists that the index visited hold too few: any rows of the partition do
                rows[i] = np.argpartition(-(self.embeddings.astype(np.float32) @ query), wanted - 1)[:wanted]
            exact[i] = self.embeddings[rows[i]].astype(np.float32) @ query
        best = np.argsort(-exact, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(exact, best, 1), np.take_along_axis(rows, best, 1)


class Database:
    """An opened database. Safe to share between threads; search effort is an argument of each call."""

    def __init__(self, root: Root, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest
        self.name = manifest.stage.rsplit("/", maxsplit=1)[-1]
        self.encoder = EncoderIdentity(**manifest.values["encoder"])
        self.dim = self.encoder.dim
        self.partition_rows = np.asarray(manifest.values["rows"], np.int64)
        self.partitions = [Partition(root, number) for number in range(len(self.partition_rows))]
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
        for shard in manifest.shards:
            for file in shard.files:
                size = root.size(file.name.removeprefix(f"{manifest.stage}/"))
                if size != file.bytes:
                    raise UserError(
                        f"{root.at(file.name)} has {size} bytes, its manifest says {file.bytes}: "
                        "the database is damaged. Build it again."
                    )
        return cls(root, manifest)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def first_position(self, number: int) -> int:
        """The row number in the database of a partition's first row."""
        return int(self._offsets[number])

    def rows_at(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Vectors]:
        """Image ids (...) int64 and unit vectors (..., dim) float32 of rows by number."""
        flat = positions.reshape(-1)
        numbers = self._partition_of(flat)
        ids = np.empty(len(flat), np.int64)
        embeddings = np.empty((len(flat), self.dim), np.float32)
        for number in np.unique(numbers):
            here = numbers == number
            rows = flat[here] - self._offsets[number]
            ids[here] = self.partitions[number].ids[rows]
            embeddings[here] = self.partitions[number].embeddings[rows]
        return ids.reshape(positions.shape), unit(embeddings).reshape(*positions.shape, self.dim)

    def require_encoder(self, identity: EncoderIdentity) -> None:
        """Raises UserError unless this database was built by the encoder of that identity."""
        if self.encoder != identity:
            raise UserError(
                f"database {self.root.url} was built by the encoder {self.encoder.model} "
                f"({self.encoder.weights}), this is {identity.model} ({identity.weights}). "
                "Build it again with this encoder, or set [clip] to the other one."
            )

    def search(self, queries: npt.ArrayLike, k: int, probes: int = 0) -> Neighbors:
        """The k rows most similar to each query. queries: (n, dim) of any float type and any length > 0.

        probes: partitions each query visits, 0 for the database's own setting; more are visited where
        these hold fewer than k rows. Fewer than k results only if the database has fewer rows.
        Raises UserError for k < 1 and for queries of another dimension, zero or not finite.
        """
        units = self._checked(queries, k)
        k = min(k, len(self))
        similarities = np.full((len(units), k), -np.inf, np.float32)
        positions = np.zeros((len(units), k), np.int64)
        visits = self._visits(units, k, probes or int(self.manifest.values["probes"]))
        for number in np.unique(visits[visits >= 0]):
            asking = np.flatnonzero((visits == number).any(axis=1))
            found, rows = self.partitions[number].search(units[asking], k)
            merged = np.concatenate([similarities[asking], found], axis=1)
            where = np.concatenate([positions[asking], rows + self._offsets[number]], axis=1)
            best = np.argsort(-merged, axis=1, kind="stable")[:, :k]
            similarities[asking] = np.take_along_axis(merged, best, 1)
            positions[asking] = np.take_along_axis(where, best, 1)
        ids, embeddings = self.rows_at(positions)
        return Neighbors(ids, similarities, embeddings, positions, self)

    def embeddings(self) -> npt.NDArray[np.float16]:
        """All vectors, (rows, dim) float16, in the order of the partitions."""
        return np.concatenate([partition.embeddings for partition in self.partitions])

    def metadata(self) -> pa.Table:
        """All metadata rows (schema.METADATA) in the same order."""
        return pa.concat_tables([partition.metadata for partition in self.partitions])

    def metadata_at(self, positions: npt.NDArray[np.int64]) -> pa.Table:
        """Metadata (schema.METADATA) of rows by number, in the order asked for."""
        numbers = self._partition_of(positions)
        parts = [
            self.partitions[number].metadata.slice(position - self._offsets[number], 1)
            for number, position in zip(numbers, positions, strict=True)
        ]
        return pa.concat_tables(parts).combine_chunks() if parts else schema.METADATA.empty_table()

    def _checked(self, queries: npt.ArrayLike, k: int) -> Vectors:
        array = np.asarray(queries, np.float32)
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        if array.ndim != 2 or array.shape[1] != self.dim:
            raise UserError(f"queries for {self.root.url} must be (n, {self.dim}), got {array.shape}")
        if not np.isfinite(array).all() or not np.abs(array).max(axis=1, initial=0).all():
            raise UserError(f"a query for {self.root.url} is zero or not finite: no direction to search")
        return unit(array)

    def _visits(self, queries: Vectors, k: int, probes: int) -> npt.NDArray[np.int64]:
        """Partitions to visit, (n, partitions), -1 for none: `probes`, and as many more as k rows take."""
        order = route(queries, self.centroids, len(self.partitions))
        seen = np.cumsum(self.partition_rows[order], axis=1)
        needed = np.maximum(probes, 1 + (seen < k).sum(axis=1))
        wanted = np.arange(len(self.partitions))[None] < needed[:, None]
        return np.where(wanted & (self.partition_rows[order] > 0), order, -1)

    def _partition_of(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._offsets, positions, side="right") - 1
