"""`make bench-optout`: time to find a list of ids in the tables of `pipeline/optout/id_tables.py`.

Writes tables of random ids to a temporary folder and looks up a list in each of them. Writes `docs/optout.json` and
`docs/optout.md`, with the time at LAION's size projected from the time per table.
"""

import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.common.report import benchmark_parser, write_report
from jobs.reporting.hardware import hardware
from pipeline.optout.id_tables import SHARDS_PER_TABLE, look_up, write_id_table
from retrieval.storage.root import Root

ROWS_PER_TABLE = 10_000 * SHARDS_PER_TABLE
PICTURES, DATABASE_ROWS, PARTITIONS = 2_300_000_000, 1_900_000_000, 1_900
"""Rows of `download`, and rows and partitions of the training database, at LAION's size."""
PAGE = """# Opt-out: finding a list

`make bench-optout`, on {hardware}, one process. {tables} tables of {rows_per_table:,} random ids; {share:.0%} of a list
of {ids:,} ids are among them.

| step | measured |
|---|---:|
| sort and write a table | {write_s:.2f} s |
| look up the list in a table | {look_up_s:.2f} s |
| ids looked up in {rows:,} rows | {ids_per_s:,.0f} per second |
| projected: the list in {all_tables:,} tables ({pictures:,} pictures, {partitions:,} partitions), one core | {minutes:.1f} minutes |
| projected: 16 cores | {minutes_16:.1f} minutes |

The tables were in the page cache, so reading {all_gb:,.0f} GB at the projected size is not part of it. A table is made
once. Domains, `sha256:` and `phash:` entries are not looked up: they read the tables of `download`.
"""  # noqa: E501


def measure(tables: int, rows_per_table: int, num_ids: int) -> dict[str, Any]:
    """Seconds of each step. num_ids: length of the list. It has one id for every 1,000 rows of the tables."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Root(folder)
        listed, write_s = [], 0.0
        for number in range(tables):
            keys = rng.integers(-(2**63), 2**63, rows_per_table)
            listed.append(keys[::1000])
            started = time.perf_counter()
            write_id_table(root, f"{number:05d}", keys, np.arange(rows_per_table) // 10_000)
            write_s += time.perf_counter() - started
        expected = np.concatenate(listed)
        others = rng.integers(-(2**63), 2**63, num_ids - len(expected))
        ids = np.sort(np.concatenate([expected, others]))
        started = time.perf_counter()
        found = [look_up(root, f"{number:05d}", ids)[0] for number in range(tables)]
        look_up_s = time.perf_counter() - started
    if not np.isin(expected, np.concatenate(found)).all():
        raise RuntimeError("ids of the list were not found")
    return {"write_s": write_s / tables, "look_up_s": look_up_s / tables, "share": len(expected) / num_ids}


def report(tables: int, rows_per_table: int, num_ids: int) -> dict[str, Any]:
    """The measurement and its projection."""
    measured = measure(tables, rows_per_table, num_ids)
    all_tables = PICTURES // ROWS_PER_TABLE + 1 + PARTITIONS
    minutes = measured["look_up_s"] * all_tables / 60
    return {
        "hardware": hardware(),
        "tables": tables,
        "rows_per_table": rows_per_table,
        "rows": tables * rows_per_table,
        "ids": num_ids,
        **measured,
        "ids_per_s": num_ids / (measured["look_up_s"] * tables),
        "pictures": PICTURES,
        "partitions": PARTITIONS,
        "all_tables": all_tables,
        "all_gb": 16 * (PICTURES + DATABASE_ROWS) / 1e9,
        "minutes": minutes,
        "minutes_16": minutes / 16,
    }


def main() -> None:
    parser = benchmark_parser("pipeline.optout_search", __doc__)
    parser.add_argument("--tables", type=int, default=8, help="number of tables")
    parser.add_argument("--ids", type=int, default=1_000_000, help="length of the list")
    options = parser.parse_args()
    result = report(options.tables, ROWS_PER_TABLE, options.ids)
    write_report(options.docs, "optout", result, PAGE.format(**result))


if __name__ == "__main__":
    main()
