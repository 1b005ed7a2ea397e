"""The table of other sizes and seeds: our engine against ScaNN and against the fastest method with little memory."""

from itertools import groupby
from typing import Any

from benchmarks.common.report import machines
from benchmarks.retrieval.catalog import BARE, BY_NAME, DATABASE
from jobs.reporting.tables import markdown_table

SMALL_BYTES = 1024
"""Anonymous memory per row of the methods that count as small."""
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
        "x fastest small:",
        "",
    ]
    heading = "**Other sizes and seeds, `Database.search`**"
    hardware = machines({f"{race['rows']:,} rows, seed {race['seed']}": race["hardware"] for race in races})
    return [heading, markdown_table(headings, lines), EXPLANATION.format(machines=hardware)]


EXPLANATION = """The times are at equal recall. Machines: {machines}. *Small* are the other methods whose
process has at most 1,024 bytes a row besides mapped files after all searches. Rates of two methods are compared through
that of ScaNN in the same rounds."""


def _lines(race: dict[str, Any]) -> list[list[str]]:
    lines = []
    rows = sorted((row for row in race["chosen"] if row["ratio"] is not None), key=_case)
    for case, group in groupby(rows, _case):
        ratios = {row["method"]: row["ratio"] for row in group}
        if DATABASE.name in ratios:
            ours = next(row for row in race["chosen"] if row["method"] == DATABASE.name and _case(row) == case)
            stream, k, target, mode = case
            cells = [f"{race['rows']:,}", str(race["seed"]), stream, str(k), str(target), mode]
            lines.append([*cells, f"{ours['ms']:.3f}", f"{ours['ratio']:.2f}", *_fastest_small(race, ratios)])
    return lines


def _fastest_small(race: dict[str, Any], ratios: dict[str, float]) -> list[str]:
    small = [name for name in ratios if name not in (DATABASE.name, BARE.name) and _is_small(race, name)]
    if not small:
        return ["", ""]
    best = max(small, key=ratios.__getitem__)
    return [f"{ratios[DATABASE.name] / ratios[best]:.2f}", BY_NAME[best].label]


def _is_small(race: dict[str, Any], name: str) -> bool:
    opened = race["opened"][name]
    return bool((opened["bytes"] - opened["mapped_bytes"]) / race["rows"] <= SMALL_BYTES)


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in CASE)
