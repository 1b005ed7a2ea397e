"""Projected hours and costs of the paper's neighbor table: 100M queries against 1.9B rows, k=8.

Extrapolates the measurements of `scale` and writes a section of `docs/performance.md`. Nothing was run at that size.
"""

import math
from typing import Any

from jobs.reporting.tables import markdown_table

QUERIES, ROWS = 100_000_000, 1_900_000_000
SIZES = (20_000_000, ROWS)
FLOP_PER_PAIR = 2 * 768
NODE_CPUS, NODE_BYTES, NODE_PRICE = 64, 512e9, 2.56
"""Assumed: a node of 64 CPUs and 512 GB at 0.04 dollars per CPU hour."""
MEMORY_SHARE = 0.8
GPU_FLOPS, GPU_SHARE, GPU_PRICE = 989e12, 0.35, 3.0
"""Published dense bfloat16 rate of an H100; the used share of it and the price per hour are assumed."""
PARTITION_ROWS, PARTITIONS_PER_QUERY = 1_000_000, 8
GPU_READ_BYTES_PER_S = 2e9
"""Assumed rate at which the GPU reads vectors from storage."""

LINES = {
    "single_us": "single query, one thread",
    "batch_us": "query in a batch, two threads",
    "wall_us": "joined query, wall, one thread",
    "cpu_us": "joined query, CPU time",
}

NOTES = """Our engine at several sizes, with partitions of {partition:,} rows, recall@20 >= 0.95 for queries
and recall@8 >= 0.965 for the join ({joined}), in interleaved rounds. Each line is fitted by a power of the
number of rows; the last two columns extrapolate this fit and were not measured.

A database takes {row_bytes:,.0f} bytes per row on disk. Number of nodes with {node_gb:.0f} GB, {share:.0%}
filled, that hold it in memory: {nodes}."""

ASSUMPTIONS = """Assumed, not measured: a CPU of such a node is as fast as one of this machine and costs
{cpu_price:.2f} dollars an hour; the database of a node is in its memory. **No GPU was measured:** {tera:.0f}
TFLOP/s is the published dense bfloat16 rate of an H100, of which {gpu_share:.0%} is assumed to be available
besides the top-k, at {gpu_price:.2f} dollars an hour; vectors are read once from storage at {read:.0f} GB/s;
{visited} of 1,900 partitions per query is a guess, because recall was not measured at that size. Building
the database and writing 1.2 TB of neighbors are not counted."""

Points = list[dict[str, Any]]


def fit(points: Points, name: str) -> tuple[float, float]:
    """(a, b) of time = a * rows^b by least squares on logarithms, b at least 0. Times in microseconds."""
    x = [math.log(point["rows"]) for point in points]
    y = [math.log(point[name]) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    variance = sum((a - mean_x) ** 2 for a in x)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = max(0.0, covariance / variance) if variance else 0.0  # a negative exponent is noise
    return math.exp(mean_y - slope * mean_x), slope


def extrapolate(fitted: tuple[float, float], rows: int) -> float:
    """Microseconds at a number of rows."""
    return fitted[0] * rows ** fitted[1]


def nodes(points: Points, rows: int) -> int:
    """Number of nodes that hold a database of this size in memory."""
    return math.ceil(rows * _row_bytes(points) / (NODE_BYTES * MEMORY_SHARE))


def cpu_hours(points: Points) -> float:
    """CPU hours of the whole join, from the CPU time in one partition of a million rows."""
    return QUERIES * PARTITIONS_PER_QUERY * extrapolate(fit(points, "cpu_us"), PARTITION_ROWS) / 1e6 / 3600


def gpu_hours(rows_compared: float) -> tuple[float, float]:
    """Hours of one GPU for the products, and hours to read the vectors once."""
    compute = QUERIES * rows_compared * FLOP_PER_PAIR / (GPU_FLOPS * GPU_SHARE) / 3600
    return compute, ROWS * 2 * 768 / GPU_READ_BYTES_PER_S / 3600


def section(points: Points) -> str:
    """The section of the page about scale."""
    measured = [f"{point['rows']:,} rows:" for point in points]
    headings = ["microseconds per", *measured, "fitted exponent:", *(f"{rows:,} (fit):" for rows in SIZES)]
    rows = []
    for key, label in LINES.items():
        fitted = fit(points, key)
        cells = [f"{point[key]:,.1f}" for point in points]
        rows.append([label, *cells, f"{fitted[1]:.2f}", *(f"{extrapolate(fitted, size):,.0f}" for size in SIZES)])
    notes = NOTES.format(
        partition=PARTITION_ROWS,
        joined=", ".join(f"{point['queries_joined']:,} against {point['rows']:,}" for point in points),
        row_bytes=_row_bytes(points),
        node_gb=NODE_BYTES / 1e9,
        share=MEMORY_SHARE,
        nodes=", ".join(f"{nodes(points, size)} for {size:,} rows" for size in SIZES),
    )
    return "\n\n".join(["## Scale", notes, markdown_table(headings, rows), _table(points)])


def _table(points: Points) -> str:
    number, hours = nodes(points, ROWS), cpu_hours(points)
    wall = hours / (number * NODE_CPUS)
    cpu = [
        f"CPU, our join, {PARTITIONS_PER_QUERY} partitions per query: {hours:,.0f} CPU hours",
        f"{number} nodes of {NODE_CPUS} CPUs",
        f"{wall:,.2f}",
        f"{wall * number * NODE_PRICE:,.0f}",
    ]
    rows = [
        cpu,
        _gpu(f"GPU, exact, {PARTITIONS_PER_QUERY} partitions per query", PARTITIONS_PER_QUERY * PARTITION_ROWS),
    ]
    rows.append(_gpu("GPU, exact, all rows", ROWS))
    table = markdown_table(["method", "machines", "hours:", "dollars:"], rows)
    assumptions = ASSUMPTIONS.format(
        cpu_price=NODE_PRICE / NODE_CPUS,
        tera=GPU_FLOPS / 1e12,
        gpu_share=GPU_SHARE,
        gpu_price=GPU_PRICE,
        read=GPU_READ_BYTES_PER_S / 1e9,
        visited=PARTITIONS_PER_QUERY,
    )
    size = f"{QUERIES / 1e6:.0f}M queries, {ROWS / 1e9:.1f}B rows, k=8"
    title = f"**The paper's neighbor table** ({size}), projected:"
    return "\n\n".join([title, table, assumptions])


def _gpu(label: str, rows_compared: float) -> list[str]:
    compute, read = gpu_hours(rows_compared)
    hours = max(compute, read)
    detail = f"{label}: {compute:,.1f} h computing, {read:,.1f} h reading"
    return [detail, "1 H100", f"{hours:,.1f}", f"{hours * GPU_PRICE:,.0f}"]


def _row_bytes(points: Points) -> float:
    return points[-1]["bytes"] / points[-1]["rows"]
