"""The committed pages of the benchmarks agree with their committed numbers and with the code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.report import DOCS
from benchmarks.crashes import __main__ as crashes
from benchmarks.page import load
from benchmarks.pipeline import __main__ as stages
from benchmarks.pipeline import download, near_copies, partitions
from benchmarks.retrieval import filters, grow, indexes
from benchmarks.retrieval.report import report
from benchmarks.scale import __main__ as scale
from benchmarks.training import attribution, curve, loader, memory, sampling, schedule, step

PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "attribution": attribution.page,
    "crashes": crashes.page,
    "curve": curve.page,
    "download": download.page,
    "filters": filters.page,
    "grow": grow.page,
    "indexes": indexes.page,
    "load": load.page,
    "loader": loader.page,
    "near_copies": near_copies.page,
    "partitions": partitions.page,
    "pipeline": stages.page,
    "sampling": sampling.page,
    "scale": scale.page,
    "step": step.page,
    "training": lambda result: schedule.page(result["recipes"]) + memory.section(result["memory"]),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_committed_page_is_what_the_code_writes_from_the_committed_numbers(name: str) -> None:
    result = json.loads((DOCS / f"{name}.json").read_text())
    assert (DOCS / f"{name}.md").read_text() == PAGES[name](result)


def test_the_page_of_retrieval_is_what_the_code_writes_from_the_committed_numbers(tmp_path: Path) -> None:
    report.write(json.loads((DOCS / "performance.json").read_text()), tmp_path)
    assert (DOCS / "performance.md").read_text() == (tmp_path / "performance.md").read_text()
