"""Arithmetic for the paper's neighbor table, 100M queries against 1.9B rows, k=8: hours and money.

Takes what `scale` measured and writes a section of `docs/performance.md`. Nothing was run at that size.
"""

import math
from typing import Any

from benchmarks.common.report import markdown_table

QUERIES, ROWS = 100_000_000, 1_900_000_000
SIZES = (20_000_000, ROWS)
FLOP_PER_PAIR = 2 * 768
NODE_CPUS, NODE_BYTES, NODE_PRICE = 64, 512e9, 2.56
"""Assumed: a node of 64 CPUs and 512 GB at 0.04 dollars a CPU and hour."""
MEMORY_SHARE = 0.8
GPU_FLOPS, GPU_SHARE, GPU_PRICE = 989e12, 0.35, 3.0
"""An H100's published dense bfloat16 rate; the share of it and the price per hour are assumed."""
PARTITION_ROWS, VISITED = 1_000_000, 8
GPU_READ = 2e9
"""Assumed bytes a second at which a GPU's vectors come from storage."""

LINES = {
    "single_us": "single query, one thread",
    "batch_us": "query in a batch, two threads",
    "wall_us": "joined query, wall, one thread",
    "cpu_us": "joined query, CPU time",
}

NOTES = """Our engine at several sizes, partitions of {partition:,} rows, recall@20 >= 0.95 for queries and
recall@8 >= 0.965 for the join ({joined}), in interleaved rounds. Each line is fitted as a power
of the number of rows; the last two columns carry that fit far beyond what was measured and are
arithmetic, no more.

A database takes {row_bytes:,.0f} bytes a row on disk. Nodes of {node_gb:.0f} GB that hold it in
memory, {share:.0%} filled: {nodes}."""

ASSUMED = """Assumed, not measured: a CPU of such a node does what one of this machine's does, at
{cpu_price:.2f} dollars an hour; a node's database is in its memory. **No GPU was measured:**
{tera:.0f} TFLOP/s is the published dense bfloat16 rate of an H100, of which {gpu_share:.0%} is
assumed to be left beside the top-k, at {gpu_price:.2f} dollars an hour; vectors come from storage
at {read:.0f} GB/s and are read once; {visited} of 1,900 partitions a query is a guess that a
measurement of recall at that size would replace. Building the database and writing 1.2 TB of
neighbors are not counted."""

Points = list[dict[str, Any]]


def fit(points: Points, name: str) -> tuple[float, float]:
    """(a, b) of time = a * rows^b by least squares on logarithms, b at least 0. Times in microseconds."""
    x = [math.log(point["rows"]) for point in points]
    y = [math.log(point[name]) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    together = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = max(0.0, together / spread) if spread else 0.0  # that more rows cost less is noise
    return math.exp(mean_y - slope * mean_x), slope


def at(fitted: tuple[float, float], rows: int) -> float:
    """Microseconds at that size."""
    return fitted[0] * rows ** fitted[1]


def nodes(points: Points, rows: int) -> int:
    """Nodes whose memory together holds a database of so many rows."""
    return math.ceil(rows * _row_bytes(points) / (NODE_BYTES * MEMORY_SHARE))


def cpu_hours(points: Points) -> float:
    """CPU hours of the whole join, from the CPU time within one partition of a million rows."""
    return QUERIES * VISITED * at(fit(points, "cpu_us"), PARTITION_ROWS) / 1e6 / 3600


def gpu_hours(rows_compared: float) -> tuple[float, float]:
    """Hours of one GPU computing the products, and reading the vectors once."""
    compute = QUERIES * rows_compared * FLOP_PER_PAIR / (GPU_FLOPS * GPU_SHARE) / 3600
    return compute, ROWS * 2 * 768 / GPU_READ / 3600


def section(points: Points) -> str:
    """The part of the page about scale."""
    measured = [f"{point['rows']:,} rows:" for point in points]
    heads = ["microseconds per", *measured, "fitted exponent:", *(f"{rows:,} (fit):" for rows in SIZES)]
    rows = []
    for key, label in LINES.items():
        fitted = fit(points, key)
        cells = [f"{point[key]:,.1f}" for point in points]
        rows.append([label, *cells, f"{fitted[1]:.2f}", *(f"{at(fitted, size):,.0f}" for size in SIZES)])
    notes = NOTES.format(
        partition=PARTITION_ROWS,
        joined=", ".join(f"{point['queries_joined']:,} against {point['rows']:,}" for point in points),
        row_bytes=_row_bytes(points),
        node_gb=NODE_BYTES / 1e9,
        share=MEMORY_SHARE,
        nodes=", ".join(f"{nodes(points, size)} for {size:,} rows" for size in SIZES),
    )
    return "\n\n".join(["## Scale", notes, markdown_table(heads, rows), _table(points)])


def _table(points: Points) -> str:
    number, hours = nodes(points, ROWS), cpu_hours(points)
    wall = hours / (number * NODE_CPUS)
    cpu = [
        f"CPU, our join within {VISITED} partitions a query: {hours:,.0f} CPU hours",
        f"{number} nodes of {NODE_CPUS} CPUs",
        f"{wall:,.2f}",
        f"{wall * number * NODE_PRICE:,.0f}",
    ]
    rows = [cpu, _gpu(f"GPU, exact within {VISITED} partitions a query", VISITED * PARTITION_ROWS)]
    rows.append(_gpu("GPU, exact over everything", ROWS))
    table = markdown_table(["by", "machines", "hours:", "dollars:"], rows)
    assumed = ASSUMED.format(
        cpu_price=NODE_PRICE / NODE_CPUS,
        tera=GPU_FLOPS / 1e12,
        gpu_share=GPU_SHARE,
        gpu_price=GPU_PRICE,
        read=GPU_READ / 1e9,
        visited=VISITED,
    )
    size = f"{QUERIES / 1e6:.0f}M queries, {ROWS / 1e9:.1f}B rows, k=8"
    title = f"**The paper's neighbor table** ({size}), on paper:"
    return "\n\n".join([title, table, assumed])


def _gpu(label: str, rows_compared: float) -> list[str]:
    compute, read = gpu_hours(rows_compared)
    hours = max(compute, read)
    detail = f"{label}: {compute:,.1f} h computing, {read:,.1f} h reading"
    return [detail, "1 H100", f"{hours:,.1f}", f"{hours * GPU_PRICE:,.0f}"]


def _row_bytes(points: Points) -> float:
    return points[-1]["bytes"] / points[-1]["rows"]
