"""The table of other sizes and seeds: our engine against ScaNN, the fastest method, and the fastest with few bytes."""

from itertools import groupby
from typing import Any

from benchmarks.common.report import machines
from benchmarks.retrieval.catalog import BARE, BY_NAME, DATABASE
from jobs.reporting.tables import markdown_table

SMALL_BYTES = 1024
"""Memory per row, taken by opening, of the methods that count as small."""
CASE = ("stream", "k", "target", "mode")


def races_section(races: list[dict[str, Any]]) -> list[str]:
    """Heading, table and explanation; empty without such measurements."""
    lines = [cells for race in sorted(races, key=lambda race: (race["rows"], race["seed"])) for cells in _lines(race)]
    if not lines:
        return []
    headings = [
        "rows:",
        "seed:",
        "queries",
        "k:",
        "recall:",
        "mode",
        "ms per query:",
        "x ScaNN:",
        "x fastest:",
        "",
        "x fastest small:",
        "",
    ]
    heading = "**Other sizes and seeds, `Database.search`**"
    hardware = machines({f"{race['rows']:,} rows, seed {race['seed']}": race["hardware"] for race in races})
    return [heading, markdown_table(headings, lines), EXPLANATION.format(machines=hardware)]


EXPLANATION = """The times are at equal recall. Machines: {machines}. *Fastest* is the fastest of the other measured
methods, *small* are those of them whose process takes at most 1,024 bytes a row when it opens its index. Rates of two
methods are compared through that of ScaNN in the same rounds."""


def _lines(race: dict[str, Any]) -> list[list[str]]:
    lines = []
    rows = sorted((row for row in race["chosen"] if row["ratio"] is not None), key=_case)
    for case, group in groupby(rows, _case):
        ratios = {row["method"]: row["ratio"] for row in group}
        if DATABASE.name in ratios:
            ours = next(row for row in race["chosen"] if row["method"] == DATABASE.name and _case(row) == case)
            stream, k, target, mode = case
            cells = [f"{race['rows']:,}", str(race["seed"]), stream, str(k), str(target), mode]
            others = ratios.keys() - {DATABASE.name, BARE.name}
            small = {name for name in others if race["opened"][name]["memory_bytes"] <= SMALL_BYTES * race["rows"]}
            fastest = [cell for names in (others, small) for cell in _fastest(ratios, names)]
            lines.append([*cells, f"{ours['ms']:.3f}", f"{ours['ratio']:.2f}", *fastest])
    return lines


def _fastest(ratios: dict[str, float], names: set[str]) -> list[str]:
    """Our rate as a multiple of that of the fastest of some methods, and its name."""
    if not names:
        return ["", ""]
    best = max(sorted(names), key=ratios.__getitem__)
    return [f"{ratios[DATABASE.name] / ratios[best]:.2f}", BY_NAME[best].label]


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in CASE)
