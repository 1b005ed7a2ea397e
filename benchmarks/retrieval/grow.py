"""`make bench-grow`: CPU time and recall of rows that are added and deleted, and of merged halves, against a build.

Builds databases of generated vectors below a scratch folder, which is emptied first. Writes `docs/grow.{json,md}`.
"""

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.common.report import SCRATCH, benchmark_parser, write_report
from benchmarks.retrieval.vectors import DIM, images, mixture
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval import (
    Database,
    Effort,
    EncoderIdentity,
    add_to_database,
    build_database,
    delete_from_database,
    merge_databases,
)
from retrieval.errors import RecallWarning
from retrieval.index.routing import Vectors
from retrieval.recipe import IndexConfig

K, QUERIES, RECALL = 20, 1_000, 0.95
ADDED = (0.01, 0.1)
DELETED = 0.01
LIST_ROWS = 20_000
"""Rows whose lists are compared with the nearest centroids."""
MERGED_ROWS = 100_000
"""Halves are merged, and databases built again with the added rows, only at this many rows."""
FLAT_ROWS = 20_000
"""Setting of the databases, so that halves have inverted lists too."""
FOLDER = SCRATCH / "grow"
EFFORT = ("partitions_per_query", "lists_per_partition", "candidates_per_result")


def main() -> None:
    """Build, update, measure, write."""
    parser = benchmark_parser("retrieval.grow", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[MERGED_ROWS], help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the vectors (default %(default)s)")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    warnings.simplefilter("ignore", RecallWarning)
    sizes = [{"rows": rows, **measure(rows, options.seed)} for rows in options.rows]
    result = {"hardware": hardware(), "seed": options.seed, "sizes": sizes}
    write_report(options.docs, "grow", result, page(result))


def measure(rows: int, seed: int) -> dict[str, Any]:
    """CPU-seconds and recall of each step on a database of so many rows, and the share in their nearest list."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    vectors = images(mixture(seed), QUERIES + rows + int(ADDED[-1] * rows), seed)
    data = Data(vectors[QUERIES:], vectors[:QUERIES].copy(), rows)
    steps = [data.step("build", lambda: data.build("base", data.ids[:rows]))]
    in_nearest_list = nearest_list_share(Database.open(f"{FOLDER}/base"), seed)
    for share in ADDED:
        ids = data.ids[rows : rows + int(share * rows)]
        folder = data.copy(f"add-{share}")
        steps.append(
            data.step(
                f"add {share:.0%}",
                lambda ids=ids, folder=folder: add_to_database(folder, data.vectors[ids], table_of(ids)),
            )
        )
    deleted = np.random.default_rng(seed).permutation(rows)[: int(DELETED * rows)]
    folder = data.copy("delete")
    steps.append(data.step(f"delete {DELETED:.0%}", lambda: delete_from_database(folder, deleted)))
    if rows == MERGED_ROWS:
        effort = Database.open(f"{FOLDER}/base").effort(RECALL, k=K)
        name = f"build with {ADDED[-1]:.0%} more"
        steps.append(data.step(name, lambda: data.build("again", data.ids), effort))
        halves = [data.build(f"half-{first}", data.ids[first:rows:2]).root for first in (0, 1)]
        steps.append(data.step("merge two halves", lambda: merge_databases(f"{FOLDER}/merged", halves)))
    return {"steps": steps, "in_nearest_list": in_nearest_list}


def nearest_list_share(database: Database, seed: int) -> float:
    """The share of LIST_ROWS rows of a database of one partition that are in the list with the nearest centroid."""
    partition = database.partitions[0]
    offsets, centroids = partition.lists
    rows = np.sort(np.random.default_rng(seed).permutation(len(partition))[:LIST_ROWS])
    nearest = (partition.embeddings[rows].astype(np.float32) @ centroids.T).argmax(axis=1)
    return float((nearest == np.searchsorted(offsets, rows, side="right") - 1).mean())


@dataclass(frozen=True)
class Data:
    """Vectors with their number as id, and queries."""

    vectors: Vectors
    """(n, dim) of the database, then those that are added to it."""
    queries: Vectors
    """(QUERIES, dim) of the same distribution."""
    rows: int
    """Rows of the database at first."""

    @property
    def ids(self) -> np.ndarray:
        """(n,) of all vectors."""
        return np.arange(len(self.vectors))

    def build(self, name: str, ids: np.ndarray) -> Database:
        """Build a database of some vectors."""
        encoder = EncoderIdentity(model="generated", weights="", preprocessing="", dim=DIM)
        config = IndexConfig(flat_rows=FLAT_ROWS)
        return build_database(f"{FOLDER}/{name}", self.vectors[ids], table_of(ids), encoder=encoder, config=config)

    def copy(self, name: str) -> str:
        """The folder of a copy of the first database."""
        return str(shutil.copytree(FOLDER / "base", FOLDER / name))

    def step(self, name: str, run: Callable[[], Database], effort: Effort | None = None) -> dict[str, Any]:
        """Time of a step, and the recall of the database that it returns; effort: None for that of RECALL."""
        started = time.process_time(), time.perf_counter()
        database = run()
        times = time.process_time() - started[0], time.perf_counter() - started[1]
        effort = effort or database.effort(RECALL, k=K)
        ids = np.sort(np.concatenate([partition.ids for partition in database.partitions]))
        _, nearest = faiss.knn(self.queries, self.vectors[ids], K, metric=faiss.METRIC_INNER_PRODUCT)
        truth, results = ids[nearest], database.search(self.queries, K, effort=effort).ids
        is_found = np.array([np.isin(true, row) for true, row in zip(truth, results, strict=True)])
        of_new = is_found[truth >= self.rows]
        return {
            "step": name,
            "cpu_s": times[0],
            "wall_s": times[1],
            "recall": float(is_found.mean()),
            "recall_of_new": float(of_new.mean()) if len(of_new) else None,
            "effort": vars(effort),
        }


def table_of(ids: np.ndarray) -> pa.Table:
    """The metadata of rows with these ids."""
    return pa.table({"image_id": ids, "caption": [f"picture {number}" for number in ids.tolist()]})


def page(result: dict[str, Any]) -> str:
    tables = "\n\n".join(map(_section, result["sizes"]))
    return f"""# Adding, deleting, merging

Written by `make bench-grow` (each size is a run of its own: `ARGS="--rows 300000"`); the numbers are in `grow.json`.

**Machine:** {result["hardware"]}.

Rows of {DIM} dimensions with captions, one partition with inverted lists (two after the merge). CPU-seconds are those
of all threads, reading and writing of files included; a build includes its calibration. The recall is that of k = {K}
for {QUERIES:,} queries that are no rows, of the same distribution, at the effort that the calibration of the database
names for recall {RECALL}: after rows were added or deleted this is the calibration of the first build. *Build with 10%
more* is searched with the effort of the first build.
*Of added rows*: the share of the true neighbors that were found, among those that were added. Each step starts from
the first build.

{tables}

What bounds an update: every partition with a new or deleted row is read and written once, without training. A merged
database of the same distribution visits more partitions than one that was built at once: build again if it is searched
often.
"""


def _section(size: dict[str, Any]) -> str:
    lists = (
        f"Of {LIST_ROWS:,} rows of the build, {size['in_nearest_list']:.2%} are in the list with the nearest centroid."
    )
    return f"## {size['rows']:,} rows\n\n{_table(size['steps'])}\n\n{lists}"


def _table(steps: list[dict[str, Any]]) -> str:
    build = steps[0]
    headings = ["step", "CPU-seconds:", "share of the build:", "recall:", "points to the build:", "of added rows:"]
    return markdown_table(
        [*headings, "partitions x lists x candidates:"],
        [
            [
                step["step"],
                f"{step['cpu_s']:.1f}",
                f"{step['cpu_s'] / build['cpu_s']:.1%}",
                f"{step['recall']:.4f}",
                f"{100 * (step['recall'] - build['recall']):+.2f}",
                "" if step["recall_of_new"] is None else f"{step['recall_of_new']:.4f}",
                " x ".join(str(step["effort"][name]) for name in EFFORT),
            ]
            for step in steps
        ],
    )


if __name__ == "__main__":
    main()
