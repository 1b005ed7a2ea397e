"""Queries for pictures of nothing in particular: images of the training database that training retrieved.

Reads the neighbor tables; writes `frequency/`, the database images by how often they are neighbors, once for
each version of the tables. Drawing by that frequency is the proposal distribution of Blattmann et al.
(Retrieval-Augmented Diffusion Models, 2022, section 3.3); keeping its most likely part is their top-m.
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

from retrieval.index.hidden import blocked_ids
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
"""Most retrieved first, equal ones by id. count: rows of the neighbor tables that hold the image; file and
place: a table, by number, and a slot in it, row * k + rank, where its embedding stands."""
DRAW = 2
"""Sets the draw apart from the noise of the same seed."""
Integers = npt.NDArray[np.int64]


class PseudoQueries:
    """Draws images of the training database below a root, as often as training images retrieve them."""

    def __init__(self, root: Root) -> None:
        """Count, unless that was done for these tables. Raises UserError where `neighbors` did not finish."""
        self._root = root
        self._manifest = read_manifest(root, "neighbors")
        self.files = [file.name for shard in self._manifest.shards for file in shard.files]

    @cached_property
    def ranking(self) -> pa.Table:
        """FREQUENCY, without the images that are hidden in the training database."""
        table = _stored(self._root, self._manifest)
        if table is None:
            table = _count_all(self._root, self.files)
            _store(self._root, self._manifest, table)
        hidden = np.isin(table[schema.IMAGE_ID].to_numpy(), blocked_ids(self._root.child("index")))
        return table.filter(pa.array(~hidden))

    def draw(self, seed: int, top_m: float = 1.0) -> tuple[int, Vectors]:
        """Id and unit vector (dim,) of an image among the share `top_m` of the most retrieved ones."""
        kept = self.ranking.slice(0, max(1, math.ceil(top_m * len(self.ranking))))
        reach = np.cumsum(kept["count"].to_numpy())
        ticket = np.random.default_rng([seed, DRAW]).integers(reach[-1])
        row = kept.slice(int(np.searchsorted(reach, ticket, side="right")), 1).to_pylist()[0]
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
    made_from = {"neighbors": neighbors.identity}
    shard = ShardRecord("00000", len(table), (file,))
    write_manifest(
        root, Manifest(STAGE, schema.VERSION, neighbors.identity, made_from, {}, (shard,), {}, 0.0)
    )


def _count_all(root: Root, files: list[str]) -> pa.Table:
    """FREQUENCY of all tables. Holds each image once for every table it stands in."""
    began = time.monotonic()
    parts = [
        _count(root, name, number)
        for number, name in enumerate(tqdm(files, desc=STAGE, unit="table", mininterval=0.5))
    ]
    ids, counts, numbers, places = (np.concatenate(column) for column in zip(*parts, strict=True))
    known, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    total = np.zeros(len(known), np.int64)
    np.add.at(total, inverse, counts)
    order = np.lexsort((known, -total))
    columns = [known, total, numbers[first].astype(np.int32), places[first]]
    log.info("%s: %s images in %.1f s", STAGE, f"{len(known):,}", time.monotonic() - began)
    return pa.table([column[order] for column in columns], schema=FREQUENCY)


def _count(root: Root, name: str, number: int) -> tuple[Integers, Integers, Integers, Integers]:
    """Ids of one table, how often each stands in it, the table's number, and a slot of each."""
    with root.open(name) as file:
        table = pq.read_table(file, columns=[schema.NEIGHBOR_IDS])
    ids = schema.vectors(table, schema.NEIGHBOR_IDS).reshape(-1)
    known, first, counts = np.unique(ids, return_index=True, return_counts=True)
    return known, counts, np.full(len(known), number), first
