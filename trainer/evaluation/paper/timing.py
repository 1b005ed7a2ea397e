"""Retrieval time: the k neighbors of prompts in a database (paper appendix B).

Takes an opened database and unit vectors of prompts, returns milliseconds. The neighbors' vectors are read
too, since sampling needs them.
"""

import time
from typing import Any

from retrieval.database.database import Database
from trainer.evaluation.intervals import Bootstrap
from trainer.model.context import Vectors


def retrieval_times(database: Database, queries: Vectors, k: int, bootstrap: Bootstrap) -> dict[str, Any]:
    """Milliseconds per query, for single queries and for all in one call, after one call as warm-up."""
    _milliseconds(database, queries, k)
    single = [_milliseconds(database, query[None], k) for query in queries]
    return {
        "rows": len(database),
        "partitions": len(database.partitions),
        "k": min(k, len(database)),
        "single_ms": bootstrap.median(single),
        "batch_ms": _milliseconds(database, queries, k) / len(queries),
    }


def _milliseconds(database: Database, queries: Vectors, k: int) -> float:
    started = time.perf_counter()
    database.search(queries, k, like="texts").embeddings.sum()
    return 1000 * (time.perf_counter() - started)
