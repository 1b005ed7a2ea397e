"""Checks the outputs of the data stages against the metadata and the true values of the demo world.

The brute-force search here is NumPy over all rows and shares no code with the stage that it checks.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.demo.report.funnel import num_rows
from pipeline.filter.blocked_ids import later_blocked_ids
from pipeline.recipe import NeighborsConfig
from pipeline.web.urls import canonical_url
from retrieval.clip.identity import EncoderIdentity
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

TOLERANCE = 1e-5
"""Dot products of float32 vectors in different summation orders differ by less."""


def filter_rows_unaccounted(root: Root, metadata: Root) -> int:
    """Metadata rows that were neither kept nor dropped with a reason, negative for surplus rows. Repeats count once."""
    kept = {image_id for split in schema.SPLITS for image_id in _ids(root, f"filter/{split}", schema.SELECTED)}
    manifest = read_manifest(root, "filter")
    kept.difference_update(later_blocked_ids(root, manifest).tolist())
    return num_rows(metadata, "") - len(kept) - sum(manifest.reasons.values())


def download_urls_without_status(root: Root) -> int:
    """Selected URLs without a correct status ("" if the tar has the picture, else a reason), and surplus statuses."""
    wrong = 0
    words = {"", *schema.Reason}
    for split in schema.SPLITS:
        selected = Counter(_ids(root, f"filter/{split}", schema.SELECTED))
        with_status: Counter[int] = Counter()
        for name in root.list(f"download/{split}", ".parquet"):
            table = schema.read_table(root, name, schema.DOWNLOADED)
            stored = _pictures(root, name.replace(".parquet", ".tar"))
            with_status.update(
                image_id
                for image_id, reason in zip(
                    table[schema.IMAGE_ID].to_pylist(), table["reason"].to_pylist(), strict=True
                )
                if reason in words and (image_id in stored) == (reason == "")
            )
        wrong += ((selected - with_status) + (with_status - selected)).total()
    return wrong


@dataclass(frozen=True)
class NeighborTables:
    """Checks the neighbor tables against the vectors of `embed`, the download status and the true scenes."""

    root: Root
    world: Root
    config: NeighborsConfig

    def recall(self) -> float:
        """Share of the true neighbors of all training images that the tables contain with the right vectors.

        Images with fewer than k neighbors in the database are not counted, because the tables omit them.
        """
        num_found = num_true = 0
        listed = {query: dict(zip(ids, stored, strict=True)) for query, ids, stored in self._pairs()}
        for queries, vectors in self._embedded("train"):
            bounds = self._bounds(vectors).tolist()
            for query, vector, bound in zip(queries.tolist(), vectors, bounds, strict=True):
                if np.isfinite(bound):
                    num_true += self.config.k
                    num_found += self._count_true(vector, bound, listed.get(query, {}))
        return num_found / num_true if num_true else 0.0

    def leaks(self) -> int:
        """Pairs in which the neighbor is a training image (such as the query itself) or a copy of the query.

        A copy is a picture of the same scene. Pictures without a known scene are counted too.
        """
        train_ids, train_hashes = self._training
        hashes = self._hashes("database")
        scenes = self._scenes
        return sum(
            neighbor in train_ids
            or hashes.get(neighbor) in train_hashes
            or scenes.get(neighbor) is None
            or scenes.get(neighbor) == scenes.get(query)
            for query, neighbors, _ in self._pairs()
            for neighbor in neighbors
        )

    def _bounds(self, queries: Vectors) -> Vectors:
        """The similarity of each query's k-th true neighbor, -inf if there are fewer."""
        products = queries @ self._database[1].T
        products[products >= self.config.near_copy_similarity - TOLERANCE] = -np.inf
        missing = max(0, self.config.k - products.shape[1])
        padded = np.pad(products, ((0, 0), (0, missing)), constant_values=-np.inf)
        return np.asarray(np.partition(padded, -self.config.k, axis=1)[:, -self.config.k])

    def _count_true(self, query: Vectors, bound: float, listed: dict[int, Vectors]) -> int:
        """Number of listed neighbors (id to stored vector) that are true and have the right vector."""
        count = 0
        for image_id, stored in listed.items():
            row = self._row_of.get(image_id)
            if row is not None:
                vector = self._database[1][row]
                similarity = float(query @ vector)
                is_true = bound - TOLERANCE <= similarity < self.config.near_copy_similarity + TOLERANCE
                count += is_true and _same(vector, stored)
        return count

    def _pairs(self) -> Iterator[tuple[int, list[int], Vectors]]:
        """Each training image with the ids (k) and stored vectors (k, dim) of its neighbors."""
        table_schema = schema.neighbors(self.config.k, self._dim)
        for name in self.root.list("neighbors", ".parquet"):
            table = schema.read_table(self.root, name, table_schema)
            vectors = schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS).reshape(len(table), self.config.k, self._dim)
            ids = schema.vectors(table, schema.NEIGHBOR_IDS).tolist()
            yield from zip(table[schema.IMAGE_ID].to_pylist(), ids, vectors.astype(np.float32), strict=True)

    def _embedded(self, split: str) -> Iterator[tuple[Ids, Vectors]]:
        for name in self.root.list(f"embed/{split}", ".parquet"):
            table = schema.read_table(self.root, name, schema.embeddings(self._dim))
            vectors = schema.vectors(table, schema.EMBEDDING).astype(np.float32)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            yield table[schema.IMAGE_ID].to_numpy(), vectors / lengths

    @cached_property
    def _dim(self) -> int:
        return EncoderIdentity(**read_manifest(self.root, "embed").values["encoder"]).dim

    @cached_property
    def _database(self) -> tuple[Ids, Vectors]:
        ids, vectors = zip(*self._embedded("database"), strict=True)
        return np.concatenate(ids), np.concatenate(vectors)

    @cached_property
    def _row_of(self) -> dict[int, int]:
        """Image id to row number in the database."""
        return {image_id: row for row, image_id in enumerate(self._database[0].tolist())}

    @cached_property
    def _training(self) -> tuple[set[int], set[str]]:
        """Ids of all training rows, and content hashes of the stored training pictures."""
        return set(_ids(self.root, "filter/train", schema.SELECTED)), set(self._hashes("train").values())

    @cached_property
    def _scenes(self) -> dict[int, int]:
        """Image id to the scene of its picture."""
        with self.world.open("truth.parquet") as file:
            truth = pq.read_table(file, columns=["url", "scene_uid"]).drop_null()
        addresses = map(canonical_url, truth["url"].to_pylist())
        return dict(zip(map(schema.image_id, addresses), truth["scene_uid"].to_pylist(), strict=True))

    def _hashes(self, split: str) -> dict[int, str]:
        """Image id to content hash of the stored pictures."""
        tables = [
            schema.read_table(self.root, name, schema.DOWNLOADED)
            for name in self.root.list(f"download/{split}", ".parquet")
        ]
        stored = pa.concat_tables([schema.DOWNLOADED.empty_table(), *tables]).filter(pc.field("reason") == "")
        return dict(zip(stored[schema.IMAGE_ID].to_pylist(), stored["sha256"].to_pylist(), strict=True))


def _ids(root: Root, folder: str, table_schema: pa.Schema) -> list[int]:
    return [
        image_id
        for name in root.list(folder, ".parquet")
        for image_id in schema.read_table(root, name, table_schema)[schema.IMAGE_ID].to_pylist()
    ]


def _pictures(root: Root, name: str) -> set[int]:
    """Image ids of the pictures in a tar."""
    with root.local(name) as path, tarfile.open(path) as tar:
        keys = [Path(member.name).stem for member in tar if member.name.endswith(schema.PICTURE_SUFFIXES)]
    return {int.from_bytes(bytes.fromhex(key), "big", signed=True) for key in keys}


def _same(row: Vectors, stored: Vectors) -> bool:
    """True if a neighbor's stored vector has the direction of its database row."""
    return float(row @ stored) > 0.999 * float(np.linalg.norm(stored)) > 0
