"""Our engine: `Database.search`, and the faiss call in it.

Effort: partitions per query, inverted lists per partition, candidates per result.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.retrieval.adapters.adapter import Search, SearchAdapter
from benchmarks.retrieval.data import Ids
from retrieval import Database, Root
from retrieval.clip.identity import EncoderIdentity
from retrieval.index.effort import Effort
from retrieval.index.top_k import drop_repeats
from retrieval.recipe import IndexConfig
from retrieval.storage import schema

NAME = "database"


class OurDatabase(SearchAdapter):
    """`Database.search`."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        """`write_database`, with partitions of a million rows; calibrated also on texts of another seed."""
        from retrieval.database.build import DatabaseIdentity, write_database  # loads torch
        from retrieval.database.calibration import recalibrate

        faiss.omp_set_num_threads(threads)
        dim = rows.shape[1]
        encoder = EncoderIdentity(model="benchmark", weights="", preprocessing="", dim=dim)
        config = IndexConfig(rows_per_partition=1_000_000, cores_per_partition=threads)
        write_database(Root(str(folder)), _table(rows), encoder, config, DatabaseIdentity(NAME, {}))
        recalibrate(Root(str(folder / NAME)), np.load(folder.parent / "calibration_texts.npy"), "texts")
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self.database = Database.open(str(folder / NAME))

    def threads(self, number: int) -> None:
        faiss.omp_set_num_threads(number)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """`Database.search`; the image ids are row numbers."""
        settings = Effort(*effort)
        return lambda queries: self.database.search(queries, k, effort=settings).ids

    def effort(self, recall: float, like: str) -> tuple[int, ...]:
        """The effort that the calibration in the manifest selects for a recall."""
        effort = self.database.effort(recall, like=like)
        return effort.partitions_per_query, effort.lists_per_partition, effort.candidates_per_result


class BareIndex(OurDatabase):
    """The faiss index of the only partition, called directly with the same parameters."""

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """`index.search` of faiss; the results are rows of the partition."""
        (partition,) = self.database.partitions
        parameters, count = partition.parameters(Effort(*effort), k), k * partition.results_per_row
        return lambda queries: partition.index.search(queries, count, params=parameters)[1]

    def ids(self, results: Ids) -> Ids:
        """Row numbers in the input of the build, without repeats."""
        (partition,) = self.database.partitions
        k = results.shape[1] // partition.results_per_row
        return partition.ids[drop_repeats(np.zeros(results.shape, np.float32), results, k)[1]]


def _table(rows: np.ndarray) -> pa.Table:
    """The rows as an embeddings table with empty metadata."""
    count, dim = rows.shape
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([""]))
    empty = texts.cast(pa.string())
    ones = pa.array(np.ones(count, np.int32))
    columns = {
        schema.IMAGE_ID: np.arange(count),
        "url": empty,
        "caption": empty,
        "license": pa.nulls(count, pa.string()),
        "width": ones,
        "height": ones,
        schema.NORM: pa.nulls(count, pa.float32()),
        schema.EMBEDDING: schema.fixed_lists(np.asarray(rows)),
    }
    return pa.table(columns, schema=schema.embeddings(dim))
