"""How long retrieval takes: the k neighbors of a prompt in each database (paper appendix B).

Takes opened databases and unit vectors of prompts, gives milliseconds by database. A query is searched
for alone, and its neighbors' vectors are read, which is what a sample needs.
"""

import time
from typing import Any

from retrieval.database.database import Database
from trainer.evaluation.paper.intervals import Bootstrap
from trainer.model.context import Vectors


def retrieval_times(database: Database, queries: Vectors, k: int, bootstrap: Bootstrap) -> dict[str, Any]:
    """Milliseconds a query, the queries one by one and all in one call, after one round unmeasured."""
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
    effort = database.effort(0.95, "texts")
    began = time.perf_counter()
    database.search(queries, k, effort=effort).embeddings.sum()
    return 1000 * (time.perf_counter() - began)
