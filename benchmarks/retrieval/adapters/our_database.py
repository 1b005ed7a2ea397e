"""Our own engine: `Database.search`, and the faiss call under it.

Effort: partitions, inverted lists in each, rows ranked exactly for each result.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.retrieval.adapters.adapter import Method, Search
from benchmarks.retrieval.data import Ids
from retrieval import Database, Root
from retrieval.clip.identity import EncoderIdentity
from retrieval.index.effort import Effort
from retrieval.index.partition import drop_repeats
from retrieval.recipe import IndexConfig
from retrieval.storage import schema

NAME = "database"
CALIBRATION_TEXTS = 1_000


class OurDatabase(Method):
    """`Database.search`."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        """`write_database`, partitions of a million rows; calibrated on texts of another seed as well."""
        from benchmarks.retrieval.vectors import mixture, texts
        from retrieval.database.build import DatabaseIdentity, write_database  # loads torch
        from retrieval.database.calibration import recalibrate

        faiss.omp_set_num_threads(threads)
        dim = rows.shape[1]
        encoder = EncoderIdentity(model="benchmark", weights="", preprocessing="", dim=dim)
        config = IndexConfig(rows_per_partition=1_000_000, cores_per_partition=threads)
        write_database(Root(str(folder)), _table(rows), encoder, config, DatabaseIdentity(NAME, {}))
        recalibrate(Root(str(folder / NAME)), texts(mixture(0), CALIBRATION_TEXTS, 2), "texts")
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        """`Database.open`."""
        self.database = Database.open(str(folder / NAME))

    def threads(self, number: int) -> None:
        """OpenMP threads."""
        faiss.omp_set_num_threads(number)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """Image ids are row numbers here."""
        wanted = Effort(*effort)
        return lambda queries: self.database.search(queries, k, effort=wanted).ids

    def effort(self, recall: float, query_kind: str) -> tuple[int, ...]:
        """What the calibration in the manifest takes for that recall."""
        found = self.database.effort(recall, query_kind=query_kind)
        return found.partitions_per_query, found.lists_per_partition, found.candidates_per_result


class BareIndex(OurDatabase):
    """The faiss index of the one partition, asked directly with the same parameters."""

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """Rows of the partition."""
        (partition,) = self.database.partitions
        parameters, wanted = partition.parameters(Effort(*effort), k), k * partition.results_per_row
        return lambda queries: partition.index.search(queries, wanted, params=parameters)[1]

    def ids(self, found: Ids) -> Ids:
        """Row numbers of what was built from, each once."""
        (partition,) = self.database.partitions
        k = found.shape[1] // partition.results_per_row
        return partition.ids[drop_repeats(np.zeros(found.shape, np.float32), found, k)[1]]


def _table(rows: np.ndarray) -> pa.Table:
    """The rows with as little else as a database takes."""
    number, dim = rows.shape
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(number, np.int32)), pa.array([""]))
    empty = texts.cast(pa.string())
    ones = pa.array(np.ones(number, np.int32))
    columns = {
        schema.IMAGE_ID: np.arange(number),
        "url": empty,
        "caption": empty,
        "license": pa.nulls(number, pa.string()),
        "width": ones,
        "height": ones,
        schema.EMBEDDING: schema.fixed_lists(np.asarray(rows)),
    }
    return pa.table(columns, schema=schema.embeddings(dim))
