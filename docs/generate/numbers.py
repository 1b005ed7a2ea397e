"""Writes the headline numbers of README.md from the JSON files that the demo and the benchmarks committed.

Reads `docs/{paper,performance,download,crashes,step}.json`. `make docs` writes them; a test compares.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
Row = tuple[str, str, str]


def load(name: str) -> Any:
    """The committed numbers of one page."""
    return json.loads((REPOSITORY / "docs" / f"{name}.json").read_text())


def interval(estimate: Sequence[float]) -> str:
    """A value with its 95 % interval.

    >>> interval((0.01, -0.005, 0.03))
    '0.010 (-0.005 to 0.030)'
    """
    value, low, high = estimate
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def style_row() -> Row:
    tables = load("paper")["tables"]
    accuracy, effect = tables["modes"]["retrieval"]["accuracy"], tables["effect"]["suffix_retrieval"]
    verdict = "not distinguishable from 0" if effect[1] <= 0 else "above 0"
    return (
        "share of 200 samples that the style classifier assigns to the searched database; "
        "difference to naming the style in the prompt, with neighbors of the training database",
        f"{interval(accuracy)}; {interval(effect)}, {verdict}",
        "[paper](docs/paper.md)",
    )


def search_row() -> Row:
    chosen = {
        (point["method"], point["mode"], point["target"]): point for point in load("performance")["search"]["chosen"]
    }
    cells = []
    for mode, label in (("batch", "in batches, two threads"), ("single", "alone, one thread")):
        ours, scann = chosen["database", mode, 0.95], chosen["scann", mode, 0.95]
        cells.append(f"{ours['ms']:.3f} ms {label}, {ours['ratio']:.2f} x ScaNN (recall {scann['recall']:.3f})")
    recall = chosen["database", "batch", 0.95]["recall"]
    label = f"one query on a million vectors of 768 dimensions, recall@20 {recall:.3f}"
    return (label, "; ".join(cells), "[retrieval](docs/performance.md)")


def download_row() -> Row:
    cases = load("download")["cases"]
    ratios = [case["ratio"] for case in cases]
    ours, theirs = (max(case[side]["peak_mb"] for case in cases) for side in ("ours", "theirs"))
    return (
        "images per second of download, against img2dataset",
        f"{min(ratios):.2f} to {max(ratios):.2f} x, with {ours:.0f} MB of memory instead of {theirs:.0f}",
        "[download](docs/download.md)",
    )


def crash_row() -> Row:
    struck = [outcome for outcome in load("crashes")["outcomes"] if outcome["struck"]]
    return (
        "kills, full disks and store failures that stages survived to the same bytes",
        f"{sum(not outcome['wrong'] for outcome in struck)} of {len(struck)}",
        "[crashes](docs/crashes.md)",
    )


def step_row() -> Row:
    one_rank, zero = load("step")["runs"]
    return (
        "CPU time that the training loop adds to a bare loop",
        f"{one_rank['overhead']:.1%} on one rank, {zero['overhead']:.1%} with ZeRO 1",
        "[step](docs/step.md)",
    )


def headline() -> str:
    """The table of README.md."""
    rows = [style_row(), search_row(), download_row(), crash_row(), step_row()]
    lines = ["| measured on two CPU cores | | page |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def with_numbers(text: str) -> str:
    """README.md with its table of numbers."""
    begin, end = "<!-- numbers: headline -->\n", "\n<!-- end of numbers: headline -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{headline()}{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    page = REPOSITORY / "README.md"
    page.write_text(with_numbers(page.read_text()))
