"""Results of a benchmark are stored part by part, each with the machine that measured it."""

import json
from pathlib import Path

from benchmarks.common.report import machines, write_part


def test_each_part_is_stored_and_the_page_is_written_with_the_last_one(tmp_path: Path) -> None:
    stored, result = tmp_path / "docs/a.json", {"first": 1}
    write_part(stored, result, ("first", "second"), str)
    assert json.loads(stored.read_text()) == result
    assert not stored.with_suffix(".md").exists()
    result["second"] = 2
    write_part(stored, result, ("first", "second"), str)
    assert json.loads(stored.read_text()) == result
    assert stored.with_suffix(".md").read_text() == str(result)


def test_parts_are_named_if_several_machines_measured_them() -> None:
    assert machines({"a": "X", "b": "X"}) == "X"
    assert machines({"a": "X", "b": "Y", "c": "X"}) == "X (a, c); Y (b)"
