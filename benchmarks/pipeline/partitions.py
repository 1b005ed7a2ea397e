"""`make bench-partitions`: the share of the true neighbors of a query that lie in the partitions that it visits.

Draws vectors like those of CLIP (`benchmarks/retrieval/vectors.py`) in few dimensions, clusters them with the
partitioning of `make index`, and compares one copy of each row with two copies and with fewer, larger partitions.
Writes `docs/partitions.json` and `docs/partitions.md`.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.report import benchmark_parser, write_report
from benchmarks.retrieval.vectors import BLOCK_ROWS, Mixture, images, mixture
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval.database.build import train_partition_centroids
from retrieval.index.kmeans import nearest_centroids
from retrieval.index.routing import Numbers, Vectors, route
from retrieval.index.top_k import empty_top_k, merge_top_k
from retrieval.recipe import IndexConfig

K, DIM, QUERIES, SEED = 8, 64, 500, 0
CASES = ((1_000_000, 250), (1_000_000, 1_000), (1_000_000, 1_900))
"""Rows and partitions."""
TRAIN_ROWS = 40
"""Rows a partition that the centroids are trained on."""
SIZE_ROWS = 20_000
"""Sampled rows that the sizes of the partitions are estimated from."""
VISITED = (1, 2, 4, 8, 16, 32, 64)
GOAL = 0.95
NEAR_BORDER = 0.5
"""Share of the rows that are copied where only rows near a border are."""

PAGE = """# Partitions of the neighbor join

`make bench-partitions`, on {hardware}, in {seconds:.0f} s. The share of the {k} nearest rows of a query that
are stored in the partitions with the nearest centroids. No effort within the partitions can find the others.

**These are generated vectors** (`benchmarks/retrieval/vectors.py`, {dim} dimensions): topics, clusters of unequal
sizes, and a spectrum of 1/i. The generator and the number of dimensions decide the numbers; those of real embeddings
may differ. `min_recall` of `[neighbors]` measures them before the join. {queries:,} queries come from the same
distribution. Near copies are kept. Centroids are trained on {train_rows} rows a partition.

Copies: *2 nearest* stores each row in its two nearest partitions; *orthogonal* chooses the second so that its
residual is orthogonal to the first (SOAR); *near a border* copies the {near_border:.0%} of the rows with the least
difference between the two. Storage is relative to one copy. Compared rows are those in the visited partitions, as
a share of the rows of the database without copies, at the fewest partitions of the table with a share of {goal}.

{table}
"""


def blocks_of(vectors: Mixture, rows: int) -> Any:
    """The database, a block at a time."""
    for number in tqdm(range(-(-rows // BLOCK_ROWS)), desc=f"{rows:,} rows"):
        yield images(vectors, min(BLOCK_ROWS, rows - number * BLOCK_ROWS), SEED + 1 + number)


def nearest_rows(vectors: Mixture, rows: int, queries: Vectors) -> tuple[Vectors, Vectors]:
    """The K nearest rows of each query, (n, K, dim), and a sample of the rows to train centroids on."""
    best, kept = empty_top_k(len(queries), K), np.zeros((len(queries), K, DIM), np.float32)
    sample, start = [], 0
    for block in blocks_of(vectors, rows):
        products = queries @ block.T
        columns = np.argpartition(-products, K, axis=1)[:, :K]
        part = np.take_along_axis(products, columns, axis=1), columns + start
        positions = np.concatenate([best[1], part[1]], axis=1)
        stored = np.concatenate([kept, block[columns]], axis=1)
        best = merge_top_k(best, part, K)
        order = (positions[:, None, :] == best[1][:, :, None]).argmax(axis=2)
        kept = np.take_along_axis(stored, order[:, :, None], axis=1)
        sample.append(block[:: max(1, rows // (TRAIN_ROWS * 1_900))])
        start += len(block)
    return kept, np.concatenate(sample)


def second_nearest(rows: Vectors, centroids: Vectors, nearest: Numbers) -> Numbers:
    """The partition of the second copy: the second nearest."""
    return nearest[:, 1]


def orthogonal(rows: Vectors, centroids: Vectors, nearest: Numbers) -> Numbers:
    """The partition of the second copy that makes its residual small and orthogonal to the first (SOAR, weight 1)."""
    candidates = centroids[nearest[:, 1:]]
    first = rows - centroids[nearest[:, 0]]
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    residuals = rows[:, None] - candidates
    along = np.einsum("nd,ncd->nc", first, residuals)
    best = ((residuals**2).sum(axis=2) + along**2).argmin(axis=1)
    return np.take_along_axis(nearest[:, 1:], best[:, None], axis=1)[:, 0]


def _differences(rows: Vectors, centroids: Vectors, nearest: Numbers) -> Vectors:
    pairs = np.einsum("nd,ncd->nc", rows, centroids[nearest[:, :2]])
    return np.asarray(pairs[:, 0] - pairs[:, 1], np.float32)


def near_border(width: float) -> Callable[[Vectors, Vectors, Numbers], Numbers]:
    """Copies of the rows with a difference below width only; the others keep one partition."""

    def second(rows: Vectors, centroids: Vectors, nearest: Numbers) -> Numbers:
        return np.where(_differences(rows, centroids, nearest) < width, nearest[:, 1], nearest[:, 0])

    return second


def measure_case(truth: Vectors, sample: Vectors, queries: Vectors, partitions: int) -> list[dict[str, Any]]:
    """Shares for one number of partitions. truth: (n, K, dim); sample: rows of the database."""
    training = sample[:: max(1, len(sample) // (TRAIN_ROWS * partitions))]
    config = IndexConfig(rows_per_partition=-(-len(training) // partitions), seed=SEED)
    centroids = train_partition_centroids(training, config)
    neighbors, rows = truth.reshape(-1, DIM), sample[:: max(1, len(sample) // SIZE_ROWS)]
    nearest = [nearest_centroids(vectors, centroids, 9) for vectors in (neighbors, rows)]
    width = float(np.quantile(_differences(rows, centroids, nearest[1]), NEAR_BORDER))
    copies = {
        "1 copy": lambda _rows, _centroids, nearest: nearest[:, 0],
        "2 nearest": second_nearest,
        "orthogonal": orthogonal,
        "near a border": near_border(width),
    }
    visits = route(queries, centroids, max(VISITED))
    result = []
    for name, second in copies.items():
        stored = np.stack([nearest[0][:, 0], second(neighbors, centroids, nearest[0])], axis=1)
        stored = stored.reshape(*truth.shape[:2], 2)
        ranks = (visits[:, None, None, :] == stored[..., None]).any(axis=2)
        shares = [float(ranks[..., :count].any(axis=-1).mean()) for count in VISITED]
        first, copy = nearest[1][:, 0], second(rows, centroids, nearest[1])
        sizes = np.bincount(np.concatenate([first, copy[copy != first]]), minlength=len(centroids))
        needed = next((count for count, share in zip(VISITED, shares, strict=True) if share >= GOAL), 0)
        compared = float(sizes[visits[:, :needed]].sum(axis=1).mean() / len(rows))
        storage = float(sizes.sum() / len(rows))
        result.append({"copies": name, "shares": shares, "storage": storage, "needed": needed, "compared": compared})
    return result


def measure(cases: tuple[tuple[int, int], ...] = CASES, num_queries: int = QUERIES) -> dict[str, Any]:
    started = time.perf_counter()
    vectors = mixture(SEED, DIM)
    queries = images(vectors, num_queries, SEED)
    drawn = {rows: nearest_rows(vectors, rows, queries) for rows in sorted({rows for rows, _ in cases})}
    results = [
        {"rows": rows, "partitions": partitions, **shares}
        for rows, partitions in cases
        for shares in measure_case(*drawn[rows], queries, partitions)
    ]
    seconds = time.perf_counter() - started
    return {"hardware": hardware(), "seconds": seconds, "queries": num_queries, "dim": DIM, "k": K, "results": results}


def page(result: dict[str, Any]) -> str:
    headings = ["rows:", "partitions:", "copies", *(f"{count}:" for count in VISITED)]
    table = markdown_table(
        [*headings, "storage:", f"partitions for {GOAL}:", "rows compared:"],
        [
            [f"{case['rows']:,}", f"{case['partitions']:,}", case["copies"], *(f"{s:.3f}" for s in case["shares"])]
            + [f"{case['storage']:.2f} x"]
            + ([f"{case['needed']}", f"{case['compared']:.2%}"] if case["needed"] else [f"> {VISITED[-1]}", "-"])
            for case in result["results"]
        ],
    )
    return PAGE.format(**result, table=table, goal=GOAL, near_border=NEAR_BORDER, train_rows=TRAIN_ROWS)


def main() -> None:
    parser = benchmark_parser("pipeline.partitions", __doc__)
    options = parser.parse_args()
    result = measure()
    write_report(options.docs, "partitions", result, page(result))


if __name__ == "__main__":
    main()
