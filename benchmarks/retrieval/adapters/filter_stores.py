"""Other stores of vectors in `make bench-filters`: Lance and zvec, in .venv-bench.

`python -m benchmarks.retrieval.adapters.filter_stores STORE FOLDER` reads `rows.npy` (n, dim) and `queries.npy`
float32, `values.npy` (2, n) float32, a column each, and `cases.json`: the name of each case, its column, largest value
and true neighbors. It builds the store in FOLDER if it is missing and writes `<store>.json`: for each case the recall
and microseconds of a query at the fastest of its efforts that reaches the wanted recall, or at the last one.
"""

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

K, RECALL, ROUNDS = 20, 0.95, 5
EFFORTS = (20, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
"""Length of the list of candidates in the walk through a graph (ef)."""
REFINED = 2
"""Candidates per result that Lance ranks by their vectors."""
BLOCK_ROWS = 1_000
"""Rows of one insertion; zvec takes at most 1,024."""
Search = Callable[[np.ndarray, str | None, int], np.ndarray]
"""Query (dim,), condition or None, effort -> (K,) row numbers."""


def lance(folder: Path) -> Search:
    """Lance: one graph over 8-bit codes, refined; B-trees over the columns; conditions are applied first."""
    os.environ["LANCE_CPU_THREADS"] = "1"  # read when the library is loaded
    import lance as library
    import pyarrow as pa

    stored, partial = folder / "rows.lance", folder / "partial.lance"
    if not stored.exists():
        shutil.rmtree(partial, ignore_errors=True)  # of a killed build
        rows, values = np.load(folder / "rows.npy"), np.load(folder / "values.npy")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
        columns = {f"value{i}": column for i, column in enumerate(values)}
        table = pa.table({"id": np.arange(len(rows)), "vector": vectors, **columns})
        created = library.write_dataset(table, str(partial))
        created.create_index(
            "vector", "IVF_HNSW_SQ", metric="dot", num_partitions=1, m=32, ef_construction=200, max_level=7
        )
        for name in columns:
            created.create_scalar_index(name, "BTREE")
        partial.rename(stored)
    dataset = library.dataset(str(stored))

    def search(query: np.ndarray, condition: str | None, effort: int) -> np.ndarray:
        ef = max(effort, REFINED * K)  # Lance refuses less
        nearest = {"column": "vector", "q": query, "k": K, "ef": ef, "refine_factor": REFINED}
        columns = ["id", "_distance"]  # without the distance, Lance warns of a change at every query
        result = dataset.to_table(columns=columns, nearest=nearest, filter=condition, prefilter=True)
        return result["id"].to_numpy()

    return search


def zvec(folder: Path) -> Search:
    """zvec: a graph over 7-bit RaBitQ codes, refined; inverted indexes over the columns."""
    import zvec as library

    library.init(log_level=library.LogLevel.ERROR, query_threads=1)
    stored, partial = folder / "zvec", folder / "zvec-partial"
    if not stored.exists():
        shutil.rmtree(partial, ignore_errors=True)  # of a killed build
        rows, values = np.load(folder / "rows.npy"), np.load(folder / "values.npy")
        graph = library.HnswRabitqIndexParam(library.MetricType.IP, total_bits=7, m=16, ef_construction=200)
        vectors = library.VectorSchema("vector", library.DataType.VECTOR_FP32, rows.shape[1], graph)
        inverted = library.InvertIndexParam(enable_range_optimization=True)
        fields = [
            library.FieldSchema(f"value{i}", library.DataType.FLOAT, index_param=inverted) for i in range(len(values))
        ]
        created = library.create_and_open(
            str(partial), library.CollectionSchema("rows", fields=fields, vectors=vectors)
        )
        for start in range(0, len(rows), BLOCK_ROWS):
            numbers = range(start, min(start + BLOCK_ROWS, len(rows)))
            created.insert([_document(library, number, rows[number], values[:, number]) for number in numbers])
        created.optimize(library.OptimizeOption(1))
        created.flush()
        created.close()
        partial.rename(stored)
    collection = library.open(str(stored), library.CollectionOption(read_only=True))

    def search(query: np.ndarray, condition: str | None, effort: int) -> np.ndarray:
        options = library.HnswRabitqQueryParam(ef=effort, is_using_refiner=True)
        wanted = library.Query("vector", vector=query, param=options)
        return collection.query_internal_ids(wanted, topk=K, filter=condition)

    return search


def _document(library: Any, number: int, row: np.ndarray, values: np.ndarray) -> Any:
    fields = {f"value{i}": float(value) for i, value in enumerate(values)}
    return library.Doc(str(number), vectors={"vector": row}, fields=fields)


STORES: dict[str, Callable[[Path], Search]] = {"lance": lance, "zvec": zvec}


def measure(search: Search, queries: np.ndarray, case: dict[str, Any]) -> dict[str, Any]:
    """Recall, effort and microseconds of a query for one case."""
    condition = None if case["column"] is None else f"value{case['column']} <= {case['largest']!r}"
    for effort in EFFORTS:
        results = [search(query, condition, effort) for query in queries]
        pairs = zip(case["truth"], results, strict=True)
        recall = statistics.mean(len({*truth} & {*ids.tolist()}) / len(truth) for truth, ids in pairs)
        if recall >= RECALL:
            break
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for query in queries:
            search(query, condition, effort)
        times.append((time.perf_counter() - started) / len(queries) * 1e6)
    return {"case": case["case"], "recall": round(recall, 4), "effort": effort, "us": statistics.median(times)}


def main() -> None:
    """Build the store if it is missing, measure every case, write."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    queries = np.load(folder / "queries.npy")
    search = STORES[name](folder)
    cases = [measure(search, queries, case) for case in json.loads((folder / "cases.json").read_text())]
    (folder / f"{name}.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
