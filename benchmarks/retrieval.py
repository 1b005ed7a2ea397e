"""How fast a database answers, and how fast the neighbor join runs, on this machine.

Makes clustered unit vectors from a seed, builds a database of them in a scratch folder, and measures
medians of interleaved rounds: `Database.search` against the bare faiss calls under it, and the join
against asking faiss's exhaustive index for the same neighbors.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import faiss
import numpy as np
import pyarrow as pa

from retrieval import Database, Root, schema
from retrieval.build import Identity, IndexConfig, build_database
from retrieval.encoder_identity import EncoderIdentity
from retrieval.join import JoinConfig, join
from retrieval.partition import Vectors, unit

ROWS, DIM, QUERIES, K = 200_000, 128, 2_000, 8
CLUSTERS = 500
ROUNDS = 5


def clustered(rows: int, seed: int) -> Vectors:
    """(rows, DIM) unit rows in clusters of Zipf-like sizes."""
    centers = np.random.default_rng(7).standard_normal((CLUSTERS, DIM)).astype(np.float32)
    rng = np.random.default_rng(seed)
    chosen = np.minimum(rng.zipf(1.3, rows) - 1, CLUSTERS - 1)
    return unit(centers[chosen] + 0.7 * rng.standard_normal((rows, DIM), dtype=np.float32))


def measure() -> dict[str, float]:
    """Rates by name: queries or rows a second, and recall."""
    with tempfile.TemporaryDirectory(prefix="rdm-bench-") as folder:
        vectors, queries = clustered(ROWS, 0), clustered(QUERIES, 1)
        build_s, database = _timed(lambda: _build(folder, vectors))
        flat = faiss.IndexFlatIP(DIM)
        flat.add(vectors)
        exact = JoinConfig(k=K, near_copy_similarity=1.0, probes=0)
        routed = JoinConfig(k=K, near_copy_similarity=1.0, probes=4)
        times = _rounds(
            {
                "search_batch": lambda: database.search(queries, K),
                "search_single": lambda: [database.search(query[None], K) for query in queries[:100]],
                "faiss_flat_batch": lambda: flat.search(queries, K),
                "join_routed": lambda: join(database, queries, routed),
                "join_exact": lambda: join(database, queries, exact),
            }
        )
        true = flat.search(queries, K)[1]
        return {
            "build_rows_per_s": ROWS / build_s,
            "search_batch_queries_per_s": QUERIES / times["search_batch"],
            "search_single_queries_per_s": 100 / times["search_single"],
            "faiss_flat_batch_queries_per_s": QUERIES / times["faiss_flat_batch"],
            "join_routed_rows_per_s": QUERIES / times["join_routed"],
            "join_exact_rows_per_s": QUERIES / times["join_exact"],
            "search_recall": _recall(database.search(queries, K).ids, true),
            "join_routed_recall": _recall(
                database.rows_at(join(database, queries, routed).positions)[0], true
            ),
        }


def _build(folder: str, vectors: Vectors) -> Database:
    columns = {
        schema.IMAGE_ID: np.arange(len(vectors)),
        "url": [str(i) for i in range(len(vectors))],
        "caption": [""] * len(vectors),
        "license": pa.nulls(len(vectors), pa.string()),
        "width": pa.array([1] * len(vectors), pa.int32()),
        "height": pa.array([1] * len(vectors), pa.int32()),
        schema.EMBEDDING: schema.fixed_lists(vectors.astype(np.float16)),
    }
    encoder = EncoderIdentity(model="bench", weights="", preprocessing="", dim=DIM)
    table = pa.table(columns, schema=schema.embeddings(DIM))
    build_database(Root(folder), table, encoder, IndexConfig(rows_per_partition=20_000), Identity("db", {}))
    return Database.open(f"{folder}/db")


def _timed(work: Callable[[], Database]) -> tuple[float, Database]:
    started = time.perf_counter()
    made = work()
    return time.perf_counter() - started, made


def _rounds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each work, taken in turns so that a noisy minute hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _recall(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean([np.isin(row, good).mean() for row, good in zip(true, found, strict=True)]))
