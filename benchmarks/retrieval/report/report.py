"""Writes `performance.json`, `performance.md` and the plot from the result of one run."""

import json
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.retrieval.catalog import BARE, BY_NAME, DATABASE
from benchmarks.retrieval.report import paper_scale, plot
from benchmarks.retrieval.report.goals import goals
from benchmarks.retrieval.report.races import races_section
from benchmarks.retrieval.rounds import CASES, TARGETS, Case
from jobs.reporting.tables import markdown_table

MODES = {"single": "single query, one thread", "batch": "batches, two threads"}

INTRODUCTION = """# Speed of retrieval

Written by `make bench-retrieval`; the numbers are in `performance.json`.

**Machine:** {hardware}.

**Data:** {rows:,} generated unit vectors of 768 dimensions with the properties of CLIP vectors that make
search difficult (`benchmarks/retrieval/vectors.py`: a cone, topics and clusters of Zipf sizes, a spectrum
that falls as 1/i, 3% near copies, text queries with a modality gap), stored as float16. The true neighbors
come from brute force over the stored rows.

**Method:** each method runs in a separate process. All settings in `benchmarks/retrieval/catalog.py` are
tried on 1,000 queries. The tables compare times at equal recall on 1,000 other queries: the time at the target is
interpolated between the two settings next to it. A method with a single setting is compared at its own recall.
Settings are timed in {rounds} interleaved rounds (A B C A B C). Ratios compare two methods within one round; the tables
give the median of the rounds and their range."""

BUILDS = """Compare CPU seconds: wall time depends on the load of the machine. The files of `Database`
include vectors and metadata, which are memory-mapped; its build includes the calibration and its ground
truth. The k-means that the faiss IVF indexes share is counted in each of them. Resident memory is that of
the whole process after all searches; the system can reclaim pages of mapped files. ScaNN, the graphs and the
refined faiss indexes hold every vector in memory."""

ENGINE = """A search on Ray takes {cluster_over_database:.3f} x the time of `Database.search` in one process.

Opening takes {milliseconds:.0f} ms in a new process, and {first:.0f} ms until the first answer (files in the
page cache, imports not counted). {memory}

**Requested recall.** `Database.search(queries, k, recall=...)` selects the search settings from a
calibration that was measured when the database was built, for image or for text queries. The queries of this
table were not part of the calibration."""

MEMORY = """After 100 searches of files that were not in the page cache {resident:,.0f} MB are resident,
{share:.1%} of the {vectors:,.0f} MB of vectors; {mapped:,.0f} MB of these are pages of mapped files, which the
system can reclaim and processes share."""
CAUSES = """What costs the time of the goals that are hard to reach: half of the time of a join scores the codes of
lists, and a third finds the lists through the graph over their centroids; both read more bytes than the second cache of
a core holds. Queries by texts are far from all rows, so they visit several times as many lists as queries by images.
These shares are from a profile on an AMD EPYC, which no script repeats."""

JOIN = """The 8 nearest rows of every query at recall@8 >= 0.965, medians of interleaved rounds. Our join
runs on one thread, as in the workers of the stage `neighbors`, the others on two: compare CPU time. Brute
force was measured on 1,000 of the queries."""


def write(result: dict[str, Any], folder: Path) -> None:
    """Write all three below a folder; parts that were not measured are left out."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "performance.json").write_text(json.dumps(result, indent=1) + "\n")
    if "search" in result:
        plot.draw(result, folder / "images" / "retrieval.png")
    values = {name: result[name] for name in ("hardware", "rows", "rounds")}
    sections = [INTRODUCTION.format(**values), _goals_section(result)]
    sections += [section(result) for part, section in SECTIONS.items() if part in result]
    (folder / "performance.md").write_text("\n\n".join(sections) + "\n")


def _goals_section(result: dict[str, Any]) -> str:
    all_goals = goals(result)
    reached = sum(goal.is_met for goal in all_goals)
    table = markdown_table(["goal", "target:", "measured:", ""], [goal.cells for goal in all_goals])
    return f"## Goals: {reached} of {len(all_goals)} reached\n\n{table}\n\n{CAUSES}"


def _search(result: dict[str, Any]) -> str:
    parts = ["## Search", "![Recall against speed](images/retrieval.png)"]
    for case, target, (mode, title) in product(CASES, TARGETS, MODES.items()):
        rows = [row for row in _rows(result, case) if (row["target"], row["mode"]) == (target, mode)]
        if rows:
            queries = "" if case.stream == "images" else "text queries, "
            parts += [f"**recall@{case.k} >= {target}, {queries}{title}**", _table(result, rows)]
    missing = result["search"]["missing"]
    for reason in dict.fromkeys(missing.values()):
        names = "; ".join(name for name in missing if missing[name] == reason)
        parts.append(f"Not measured ({reason}): {names}.")
    return "\n\n".join([*parts, _builds(result), *races_section(result["races"])])


def _rows(result: dict[str, Any], case: Case) -> list[dict[str, Any]]:
    return [row for row in result["search"]["chosen"] if (row["stream"], row["k"]) == (case.stream, case.k)]


def _table(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: row["ms"]):
        name = BY_NAME[row["method"]].label
        lines.append(
            [
                f"**{name}**" if row["method"] == DATABASE.name else name,
                f"{row['ms']:.3f}",
                "" if row["ratio"] is None else f"{row['ratio']:.2f} ({_range(row['ratio_range'])})",
                f"{row['recall']:.4f}",
                _setting(row["effort"], "default"),
            ]
        )
    table = markdown_table(["", "ms per query:", "x ScaNN (range):", "recall:", "setting"], lines)
    missing = {*result["search"]["points"]} - {row["method"] for row in rows}
    labels = ", ".join(sorted(BY_NAME[name].label for name in missing))
    return f"{table}\n\nNot reached at any tested setting: {labels}." if missing else table


def _builds(result: dict[str, Any]) -> str:
    lines = []
    opened = result["search"]["opened"]
    for name, build in result["builds"].items():
        if name != BARE.name and name in opened:
            lines.append(
                [
                    BY_NAME[name].label,
                    f"{build['cpu_s']:,.0f}",
                    f"{build['wall_s']:,.0f} ({build['threads']})",
                    f"{build['bytes'] / 1e6:,.0f}",
                    f"{opened[name]['bytes'] / 1e6:,.0f}",
                    f"{opened[name]['mapped_bytes'] / 1e6:,.0f}",
                ]
            )
    headings = ["", "build, CPU s:", "wall s (threads):", "on disk, MB:", "resident, MB:", "of which mapped files:"]
    return f"**Building and memory**\n\n{markdown_table(headings, lines)}\n\n{BUILDS}"


def _engine(result: dict[str, Any]) -> str:
    ratios, opening = result["engine"]["overheads"], result["engine"]["opening"]
    batches = [
        ["the faiss call only", f"{ratios['bare_ms']:.1f}", "1"],
        ["`Database.search`", f"{ratios['database_ms']:.1f}", f"{ratios['database_ratio']:.3f}"],
        ["on Ray, one local node", f"{ratios['cluster_ms']:.1f}", f"{ratios['cluster_ratio']:.3f}"],
    ]
    memory = MEMORY.format(
        mapped=opening["mapped_bytes"] / 1e6,
        resident=opening["resident_bytes"] / 1e6,
        share=opening["share"],
        vectors=opening["vector_bytes"] / 1e6,
    )
    text = ENGINE.format(
        cluster_over_database=ratios["cluster_over_database"],
        milliseconds=opening["seconds"] * 1e3,
        first=opening["first_answer_seconds"] * 1e3,
        memory=memory,
    )
    headings = ["batches of 1,000, k=20, two threads", "ms per batch:", "x bare faiss:"]
    rows = [_calibration_cells(row) for row in result["engine"]["calibration"]]
    columns = ["requested:", "calibrated on", "queries", "measured recall:", "single ms:", "batch ms:", "setting"]
    return "\n\n".join(["## Our engine", markdown_table(headings, batches), text, markdown_table(columns, rows)])


def _calibration_cells(row: dict[str, Any]) -> list[str]:
    times = [f"{row['single_ms']:.3f}", f"{row['batch_ms']:.3f}"]
    request = [str(row["target"]), row["calibrated_on"], row["queries"]]
    return [*request, f"{row['recall']:.4f}", *times, _setting(row["effort"], "")]


def _join(result: dict[str, Any]) -> str:
    lines = []
    for row in sorted(result["join"], key=lambda row: row["cpu_us"]):
        times = [f"{row['cpu_us']:,.1f}", f"{row['wall_us']:,.1f}"]
        ratios = [f"{row['ours_cpu_ratio']:.2f}", f"{row['ours_wall_ratio']:.2f}"]
        setting = _setting(row["effort"], "exact")
        lines.append([row["label"], *times, *ratios, f"{row['recall']:.4f}", setting])
    headings = ["", "CPU us per query:", "wall us per query:", "x ours, CPU:", "x ours, wall:", "recall:", "setting"]
    return "\n\n".join(["## Join", JOIN, markdown_table(headings, lines)])


def _setting(effort: list[int], if_none: str) -> str:
    return if_none if effort == [0] else ", ".join(map(str, effort))


def _range(ends: list[float]) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}"


SECTIONS = {
    "search": _search,
    "engine": _engine,
    "join": _join,
    "scale": lambda result: paper_scale.section(result["scale"]),
}
