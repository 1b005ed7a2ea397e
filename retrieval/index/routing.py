"""Which partitions a query visits: those with the nearest centroids. `retrieval.index.kmeans` trains the centroids."""

import numpy as np
import numpy.typing as npt

from retrieval.storage.manifest import Manifest
from retrieval.storage.root import FileRecord

Vectors = npt.NDArray[np.float32]
AnyVectors = npt.NDArray[np.float16] | npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
"""Numbers of rows, partitions, lists or clusters."""


def partition_folder(number: int) -> str:
    """The name of a partition in its manifest, and its folder when it is built."""
    return f"partitions/{number:05d}"


def file_records(manifest: Manifest) -> dict[str, FileRecord]:
    """The files of a database by their name in its folder."""
    records = (file for record in manifest.shards for file in record.files)
    return {file.name.removeprefix(f"{manifest.stage}/"): file for file in records}


def stored_folders(manifest: Manifest) -> list[str]:
    """The folder of each partition within its database. A partition that lost rows later is in another one."""
    folders = {
        record.shard: record.files[0].name.removeprefix(f"{manifest.stage}/").rpartition("/")[0]
        for record in manifest.shards
        if record.files
    }
    names = (partition_folder(number) for number in range(len(manifest.values["rows"])))
    return [folders.get(name, name) for name in names]


def route(queries: Vectors, centroids: Vectors, partitions_per_query: int) -> Numbers:
    """The partitions nearest to each query, nearest first: (n, partitions_per_query) int64."""
    if len(centroids) == 1:
        return np.zeros((len(queries), min(partitions_per_query, 1)), np.int64)
    order = np.argsort(-(queries @ centroids.T), axis=1, kind="stable")
    return order[:, :partitions_per_query].astype(np.int64)


def unit(vectors: AnyVectors) -> Vectors:
    """The rows scaled to length 1, float32. A zero row stays zero."""
    rows = np.asarray(vectors, np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)
