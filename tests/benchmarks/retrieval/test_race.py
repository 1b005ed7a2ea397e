"""The race of a method is read where it was stored, unless machine, sources or engine are others now."""

import json
from pathlib import Path

import pytest

from benchmarks.retrieval import __main__ as race
from benchmarks.retrieval.catalog import DATABASE, SCANN, MethodSpec
from benchmarks.retrieval.data import BenchmarkData
from benchmarks.retrieval.rounds import CASES
from benchmarks.retrieval.workers import AdapterError, index_folder


@pytest.mark.parametrize("method", [DATABASE, SCANN], ids=lambda method: method.name)
def test_a_stored_race_of_other_conditions_is_measured_again(
    method: MethodSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_workers(*_: object) -> None:
        raise AdapterError("measured again")

    monkeypatch.setattr(race, "open_workers", open_workers)
    data = BenchmarkData(tmp_path)
    path = index_folder(data, method) / f"{method.name}-images-20.race.json"
    path.parent.mkdir()
    current = race.conditions(method)
    assert ("sources" in current) == (method is DATABASE)
    path.write_text(json.dumps({"conditions": current}))
    assert race.measure_method(data, method, {}, CASES[:1]) == {"conditions": current}
    for name in current:
        path.write_text(json.dumps({"conditions": current | {name: "another"}}))
        with pytest.raises(AdapterError, match="measured again"):
            race.measure_method(data, method, {}, CASES[:1])
    path.write_text(json.dumps({"points": {}}))
    with pytest.raises(AdapterError, match="measured again"):
        race.measure_method(data, method, {}, CASES[:1])


def test_other_races_are_those_of_the_page_and_of_the_records_without_its_own_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(rows: int, seed: int, hardware: str) -> dict[str, object]:
        return {"rows": rows, "seed": seed, "hardware": hardware, "search": {"chosen": [], "opened": {}}}

    for name, stored in (("100000", record(100_000, 0, "new")), ("300000-1", record(300_000, 1, "new"))):
        (tmp_path / f"{name}.json").write_text(json.dumps(stored))
    races = [record(100_000, 0, "old"), record(100_000, 2, "old")]
    (tmp_path / "performance.json").write_text(json.dumps({"races": races}))
    monkeypatch.setattr(race, "DOCS", tmp_path)
    others = race.other_races(tmp_path, {"rows": 300_000, "seed": 1})
    assert [(other["rows"], other["seed"], other["hardware"]) for other in others] == [
        (100_000, 0, "new"),
        (100_000, 2, "old"),
    ]


def test_races_are_added_to_the_page_in_place_of_those_of_the_same_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = json.loads((race.DOCS / "performance.json").read_text())
    kept = page["races"][0]
    record = {name: kept[name] for name in ("rows", "hardware")} | {"seed": 7, "search": kept}
    (tmp_path / "100000-7.json").write_text(json.dumps(record))
    (tmp_path / "docs/images").mkdir(parents=True)
    (tmp_path / "docs/performance.json").write_text(json.dumps(page))
    monkeypatch.setattr(race, "DOCS", tmp_path / "docs")
    for _ in range(2):
        race.add_races(tmp_path)
    added = json.loads((tmp_path / "docs/performance.json").read_text())
    races = sorted([*page["races"], kept | {"seed": 7}], key=lambda one: (one["rows"], one["seed"]))
    assert added == page | {"races": races}
    assert "| 100,000 | 7 | images |" in (tmp_path / "docs/performance.md").read_text()
