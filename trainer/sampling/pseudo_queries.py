"""Pseudo-queries for unconditional sampling: images of the training database, drawn by retrieval frequency.

Reads the neighbor tables; writes `frequency/`, the database images with the number of training images that
retrieve them, once for each version of the tables. This is the proposal distribution of Blattmann et al.
(Retrieval-Augmented Diffusion Models, 2022, section 3.3); its most frequent part is their top-m sampling.
"""

import logging
import math
import time
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from retrieval.index.hidden import hidden_ids
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from retrieval.storage.root import Root
from trainer.model.context import Vectors, unit_rows

log = logging.getLogger("sample")

STAGE = "frequency"
TABLE = f"{STAGE}/00000.parquet"
FREQUENCY = pa.schema(
    [
        pa.field(schema.IMAGE_ID, pa.int64(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("file", pa.int32(), nullable=False),
        pa.field("place", pa.int64(), nullable=False),
    ]
)
"""Sorted by count, highest first, then by id. count: rows of the neighbor tables that contain the image.
file: number of a table that has its embedding; place: position there, row * k + rank."""
RNG_STREAM = 2
"""Makes the draw independent of the noise with the same seed."""
Integers = npt.NDArray[np.int64]


class PseudoQueries:
    """Draws images of the training database with the frequency at which training images retrieve them."""

    def __init__(self, root: Root) -> None:
        """Raises UserError if the stage `neighbors` did not finish."""
        self._root = root
        self._manifest = read_manifest(root, "neighbors")
        self._hidden = hidden_ids(root.child("index"))
        self.files = [file.name for shard in self._manifest.shards for file in shard.files]

    def newest(self) -> "PseudoQueries":
        """These, or those of the present tables and hidden images if they changed. Raises as the constructor does."""
        stored = self._root.find_json("neighbors/manifest.json")
        is_same = stored is not None and stored["fingerprint"] == self._manifest.fingerprint
        is_same = is_same and np.array_equal(hidden_ids(self._root.child("index")), self._hidden)
        return self if is_same else PseudoQueries(self._root)

    @cached_property
    def ranking(self) -> pa.Table:
        """FREQUENCY table without the hidden images. Counts once for each version of the neighbor tables."""
        table = _stored(self._root, self._manifest)
        if table is None:
            table = _count_all(self._root, self.files)
            _store(self._root, self._manifest, table)
        hidden = np.isin(table[schema.IMAGE_ID].to_numpy(), self._hidden)
        return table.filter(pa.array(~hidden))

    def draw(self, seed: int, top_m: float = 1.0) -> tuple[int, Vectors]:
        """Id and unit vector (dim,) of an image from the share `top_m` of the most retrieved images."""
        candidates = self.ranking.slice(0, max(1, math.ceil(top_m * len(self.ranking))))
        cumulative = np.cumsum(candidates["count"].to_numpy())
        draw = np.random.default_rng([seed, RNG_STREAM]).integers(cumulative[-1])
        row = candidates.slice(int(np.searchsorted(cumulative, draw, side="right")), 1).to_pylist()[0]
        return row[schema.IMAGE_ID], self._embedding(self.files[row["file"]], row["place"])

    def _embedding(self, name: str, place: int) -> Vectors:
        with self._root.open(name) as file:
            table = pq.ParquetFile(file)
            k = table.schema_arrow.field(schema.NEIGHBOR_IDS).type.list_size
            row, rank = divmod(place, k)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if row < rows:
                    break
                row -= rows
            column = table.read_row_group(group, columns=[schema.NEIGHBOR_EMBEDDINGS])
        vectors = schema.vectors(column, schema.NEIGHBOR_EMBEDDINGS)[row].reshape(k, -1)
        return np.asarray(unit_rows(vectors[rank : rank + 1])[0])


def _stored(root: Root, neighbors: Manifest) -> pa.Table | None:
    if not root.exists(f"{STAGE}/manifest.json"):
        return None
    if read_manifest(root, STAGE).upstream != {"neighbors": neighbors.identity}:
        return None
    return schema.read_table(root, TABLE, FREQUENCY)


def _store(root: Root, neighbors: Manifest, table: pa.Table) -> None:
    root.delete(f"{STAGE}/manifest.json")
    file = schema.write_table(root, TABLE, table, FREQUENCY)
    upstream = {"neighbors": neighbors.identity}
    shard = ShardRecord("00000", len(table), (file,))
    write_manifest(root, Manifest(STAGE, schema.VERSION, neighbors.identity, upstream, {}, (shard,), {}, 0.0))


def _count_all(root: Root, files: list[str]) -> pa.Table:
    """FREQUENCY of all tables. Memory: each image once for every table that contains it."""
    started = time.monotonic()
    parts = [
        _count(root, name, number) for number, name in enumerate(tqdm(files, desc=STAGE, unit="table", mininterval=0.5))
    ]
    ids, counts, numbers, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    distinct, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    total = np.zeros(len(distinct), np.int64)
    np.add.at(total, inverse, counts)
    order = np.lexsort((distinct, -total))
    columns = [distinct, total, numbers[first].astype(np.int32), places[first]]
    log.info("%s: %s images in %.1f s", STAGE, f"{len(distinct):,}", time.monotonic() - started)
    return pa.table([column[order] for column in columns], schema=FREQUENCY)


def _count(root: Root, name: str, number: int) -> tuple[Integers, Integers, Integers, Integers]:
    """Distinct ids of one table, the count of each, the table's number, and a position of each."""
    with root.open(name) as file:
        table = pq.read_table(file, columns=[schema.NEIGHBOR_IDS])
    ids = schema.vectors(table, schema.NEIGHBOR_IDS).reshape(-1)
    distinct, first, counts = np.unique(ids, return_index=True, return_counts=True)
    return distinct, counts, np.full(len(distinct), number), first
