"""Writes `performance.json`, `performance.md` and the plot from what one run measured."""

import json
from pathlib import Path
from typing import Any

from benchmarks.common.report import markdown_table
from benchmarks.retrieval.catalog import BARE, BY_NAME, DATABASE
from benchmarks.retrieval.report import paper_scale as paper
from benchmarks.retrieval.report import plot
from benchmarks.retrieval.report.goals import goals
from benchmarks.retrieval.rounds import MARGIN, TARGETS

MODES = {"single": "single query, one thread", "batch": "batches, two threads"}

HEAD = """# How fast retrieval is

Written by `make bench-retrieval`; the numbers are in `performance.json`.

**Machine:** {hardware}.

**Data:** {rows:,} unit vectors of 768 dimensions, made from a seed to be hard in the way CLIP's
are (`benchmarks/retrieval/vectors.py`: a cone, topics and clusters of Zipf sizes, a spectrum that falls as
1/i, 3% near copies, texts from across a modality gap), stored as float16. The truth is brute
force over the stored rows.

**Method:** every method runs in a process of its own. All settings in `benchmarks/retrieval/catalog.py` are
tried on 1,000 queries; the fastest whose recall is {margin} above the target is then timed in
{rounds} interleaved rounds (A B C A B C). A ratio compares two methods within one round; given
are the median of the rounds and their range. Recall in the tables is that of 1,000 other queries."""

BUILDS = """CPU seconds are what to compare: an index built in the background of a busy machine has a long
wall time. What `Database` has on disk includes vectors and metadata, which it maps; in its build
are the calibration and its ground truth. The k-means that the faiss IVF rivals share is counted
in each. Resident is the whole process after all searches; pages of mapped files go when the system
needs them. ScaNN, the graphs and the rivals' refinements hold every vector in memory."""

ALONE = """Through Ray it takes {cluster_over_database:.3f} x the time of `Database.search` in one process.

Opening takes {milliseconds:.0f} ms in a fresh process, and {first:.0f} ms until the first answer
(files in the page cache, imports not counted). After 100 more searches {resident:,.0f} MB are
resident, {share:.1%} of the vectors' {vectors:,.0f} MB; {mapped:,.0f} MB of that are pages of
mapped files, which the system takes back when it needs them.

**Asking for a recall.** `Database.search(queries, k, recall=...)` looks the effort up in a
calibration that was made when the database was built, for image or for text queries. The queries
here are new to it."""

JOIN = """Every query's 8 nearest rows at recall@8 >= 0.965, medians of interleaved rounds. Ours runs on one
thread, as it does in the workers of the stage, the others on two: CPU time is what to compare.
Brute force answered 1,000 of the queries; its time per query is theirs."""


def write(result: dict[str, Any], folder: Path) -> None:
    """All three, below the folder; parts that were not measured are left out."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "performance.json").write_text(json.dumps(result, indent=1) + "\n")
    if "search" in result:
        plot.draw(result, folder / "images" / "retrieval.png")
    head = HEAD.format(**{name: result[name] for name in ("hardware", "rows", "rounds")}, margin=MARGIN)
    sections = [head, _goals(result)]
    sections += [make(result) for part, make in SECTIONS.items() if part in result]
    (folder / "performance.md").write_text("\n\n".join(sections) + "\n")


def _goals(result: dict[str, Any]) -> str:
    found = goals(result)
    missed = sum(not goal.met for goal in found)
    table = markdown_table(["goal", "wanted:", "this run:", ""], [goal.cells for goal in found])
    return f"## Goals: {len(found) - missed} of {len(found)} reached\n\n{table}"


def _search(result: dict[str, Any]) -> str:
    parts = ["## Search", "![Recall against speed](images/retrieval.png)"]
    for target in TARGETS:
        for mode, title in MODES.items():
            parts += [f"**recall@20 >= {target}, {title}**", _table(result, target, mode)]
    return "\n\n".join([*parts, _builds(result)])


def _table(result: dict[str, Any], target: float, mode: str) -> str:
    rows = [row for row in result["search"]["chosen"] if (row["target"], row["mode"]) == (target, mode)]
    lines = []
    for row in sorted(rows, key=lambda row: row["ms"]):
        name = BY_NAME[row["method"]].label
        lines.append(
            [
                f"**{name}**" if row["method"] == DATABASE.name else name,
                f"{row['ms']:.3f}",
                "" if row["ratio"] is None else f"{row['ratio']:.2f} ({_range(row['ratio_range'])})",
                f"{row['recall']:.4f}",
                _setting(row["effort"], "its own"),
            ]
        )
    table = markdown_table(["", "ms per query:", "x ScaNN (range):", "recall:", "setting"], lines)
    absent = {*result["search"]["points"]} - {row["method"] for row in rows}
    labels = ", ".join(sorted(BY_NAME[name].label for name in absent))
    return f"{table}\n\nNot reached at any setting tried: {labels}." if absent else table


def _builds(result: dict[str, Any]) -> str:
    lines = []
    opened = result["search"]["opened"]
    for name, built in result["builds"].items():
        if name != BARE.name and name in opened:
            lines.append(
                [
                    BY_NAME[name].label,
                    f"{built['cpu_s']:,.0f}",
                    f"{built['wall_s']:,.0f} ({built['threads']})",
                    f"{built['bytes'] / 1e6:,.0f}",
                    f"{opened[name]['bytes'] / 1e6:,.0f}",
                    f"{opened[name]['mapped_bytes'] / 1e6:,.0f}",
                ]
            )
    heads = ["", "build, CPU s:", "wall s (threads):", "on disk, MB:", "resident, MB:", "of it mapped files:"]
    return f"**Building and holding**\n\n{markdown_table(heads, lines)}\n\n{BUILDS}"


def _engine(result: dict[str, Any]) -> str:
    over, opening = result["engine"]["overheads"], result["engine"]["opening"]
    batches = [
        ["the faiss call alone", f"{over['bare_ms']:.1f}", "1"],
        ["`Database.search`", f"{over['database_ms']:.1f}", f"{over['database_ratio']:.3f}"],
        ["through Ray, one local node", f"{over['cluster_ms']:.1f}", f"{over['cluster_ratio']:.3f}"],
    ]
    text = ALONE.format(
        cluster_over_database=over["cluster_over_database"],
        milliseconds=opening["seconds"] * 1e3,
        first=opening["first_answer_seconds"] * 1e3,
        mapped=opening["mapped_bytes"] / 1e6,
        resident=opening["resident_bytes"] / 1e6,
        share=opening["share"],
        vectors=opening["vector_bytes"] / 1e6,
    )
    head = ["batches of 1,000, k=20, two threads", "ms per batch:", "x bare faiss:"]
    calibration = [_calibrated(row) for row in result["engine"]["calibration"]]
    names = [
        "asked for:",
        "calibrated on",
        "queries",
        "recall reached:",
        "single ms:",
        "batch ms:",
        "setting",
    ]
    return "\n\n".join(
        ["## The engine alone", markdown_table(head, batches), text, markdown_table(names, calibration)]
    )


def _calibrated(row: dict[str, Any]) -> list[str]:
    times = [f"{row['single_ms']:.3f}", f"{row['batch_ms']:.3f}"]
    asked = [str(row["target"]), row["calibrated_on"], row["queries"]]
    return [*asked, f"{row['recall']:.4f}", *times, _setting(row["effort"], "")]


def _join(result: dict[str, Any]) -> str:
    lines = []
    for row in sorted(result["join"], key=lambda row: row["cpu_us"]):
        times = [f"{row['cpu_us']:,.1f}", f"{row['wall_us']:,.1f}"]
        ratios = [f"{row['ours_cpu_ratio']:.2f}", f"{row['ours_wall_ratio']:.2f}"]
        setting = _setting(row["effort"], "exact")
        lines.append([row["label"], *times, *ratios, f"{row['recall']:.4f}", setting])
    heads = [
        "",
        "CPU us per query:",
        "wall us per query:",
        "x ours, CPU:",
        "x ours, wall:",
        "recall:",
        "setting",
    ]
    return "\n\n".join(["## Join", JOIN, markdown_table(heads, lines)])


def _setting(effort: list[int], without: str) -> str:
    return without if effort == [0] else ", ".join(map(str, effort))


def _range(ends: list[float]) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}"


SECTIONS = {
    "search": _search,
    "engine": _engine,
    "join": _join,
    "scale": lambda result: paper.section(result["scale"]),
}
