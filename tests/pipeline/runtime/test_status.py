"""What manifests and records tell of each stage: how far, how fast, how long still, and whether stale."""

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.runtime.status import Status, Wanted, duration, look
from retrieval.config import Config, speed
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, write_manifest, write_record
from retrieval.storage.root import FileRecord, Root

NOW = 2_000_000_000.0


class Settings(Config):
    """Of a stage."""

    k: int = 8
    workers: int = speed(0)


def write_records(root: Root, stage: str, shards: list[str], ended: float, every: float) -> None:
    """Records of finished shards, one each `every` seconds, the last at `ended`; 100 rows, 10 not found."""
    for number, shard in enumerate(shards):
        file = FileRecord(f"{stage}/{shard}.parquet", 1000, "")
        write_record(root, stage, "print", ShardRecord(shard, 100, (file,), {"not_found": 10, "timeout": 1}))
        when = ended - every * (len(shards) - 1 - number)
        os.utime(root.local_path(f"{stage}/records/{shard}.json"), (when, when))


def write_stage(root: Root, name: str, upstream: dict[str, str], config: Config) -> Manifest:
    """A finished stage of two shards with 150 rows, made in 30 seconds."""
    shards = tuple(
        ShardRecord(f"train/{n}", rows, (FileRecord(f"{n}", 7, f"{n}"),), {"timeout": n})
        for n, rows in enumerate((100, 50))
    )
    print_ = fingerprint(name, 1, config, upstream)
    made = Manifest(name, 1, print_, upstream, config.model_dump(mode="json"), shards, {}, 30.0)
    write_manifest(root, made)
    return made


def numbered(count: int) -> list[str]:
    return [f"train/{number:05d}" for number in range(count)]


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_a_stage_without_files_has_not_started(root: Root) -> None:
    assert look(root, Wanted("embed", "embed", Settings()), {}, NOW) == Status("embed", "not started")


def test_a_begun_stage_without_records_is_unfinished(root: Root) -> None:
    root.write_json("embed/started.json", {"fingerprint": "print"})
    found = look(root, Wanted("embed", "embed", None, {"": 12}), {}, NOW)
    assert (found.state, found.done, found.total, found.eta_s) == ("unfinished", 0, 12, None)
    assert found.note == "no shard is done yet"


def test_rows_pace_and_time_left_follow_from_the_records_alone(root: Root) -> None:
    write_records(root, "download", numbered(20), ended=NOW - 3, every=4)
    found = look(root, Wanted("download", "download", None, {"": 50}), {}, NOW)
    assert (found.state, found.done, found.total) == ("unfinished", 20, 50)
    assert (found.rows, found.bytes, found.reasons) == (2000, 20_000, {"not_found": 200, "timeout": 20})
    assert found.rows_per_s == pytest.approx(100 / 4)
    assert found.eta_s == pytest.approx(30 * 4)
    assert found.note == "last shard 3 s ago"


def test_the_time_left_is_judged_by_the_last_part(root: Root) -> None:
    write_records(root, "download", numbered(20), ended=NOW - 3, every=1)
    for number in range(12):  # the first ones came slowly
        when = NOW - 1000 + number
        os.utime(root.local_path(f"download/records/train/{number:05d}.json"), (when, when))
    found = look(root, Wanted("download", "download", None, {"": 50}), {}, NOW)
    assert found.eta_s == pytest.approx(30 * 1)


def test_a_stage_that_fell_silent_promises_no_time(root: Root) -> None:
    write_records(root, "download", numbered(20), ended=NOW - 600, every=1)
    found = look(root, Wanted("download", "download", None, {"": 50}), {}, NOW)
    assert found.eta_s is None
    assert found.note == "last shard 10 min ago: interrupted, or its shards take long"


def test_few_shards_or_an_unknown_total_promise_no_time(root: Root) -> None:
    write_records(root, "download", numbered(7), ended=NOW, every=1)
    assert look(root, Wanted("download", "download", None, {"": 50}), {}, NOW).eta_s is None
    write_records(root, "embed", numbered(20), ended=NOW, every=1)
    found = look(root, Wanted("embed", "embed", None), {}, NOW)
    assert (found.total, found.eta_s) == (None, None)


def test_of_more_records_than_are_read_the_sums_are_scaled(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.runtime.status.RECORDS_READ", 5)
    write_records(root, "download", numbered(20), ended=NOW, every=1)
    found = look(root, Wanted("download", "download", None, {"": 50}), {}, NOW)
    assert found.is_estimate
    assert (found.done, found.rows, found.bytes, found.reasons["not_found"]) == (20, 2000, 20_000, 200)


def test_a_stage_of_phases_counts_the_phase_it_is_in(root: Root) -> None:
    write_records(root, "neighbors", [f"route/{n:05d}" for n in range(6)], ended=NOW - 100, every=1)
    write_records(root, "neighbors", [f"match/{n:05d}" for n in range(9)], ended=NOW, every=2)
    wanted = Wanted("neighbors", "neighbors", None, {"match": 12})
    found = look(root, wanted, {}, NOW)
    assert (found.phase, found.done, found.total, found.eta_s) == ("match", 9, 12, pytest.approx(3 * 2))
    write_records(root, "neighbors", ["merge/00000"], ended=NOW, every=1)
    found = look(root, wanted, {}, NOW)
    assert (found.phase, found.done, found.total) == ("merge", 1, 6)


def test_unfinished_files_of_records_do_not_count(root: Root) -> None:
    write_records(root, "embed", numbered(2), ended=NOW, every=1)
    (root.local_path("embed/records/train") / ".partial-1-00009.json").write_text("{")
    assert look(root, Wanted("embed", "embed", None), {}, NOW).done == 2


def test_a_finished_stage_tells_what_its_manifest_holds(root: Root) -> None:
    made = write_stage(root, "embed", {}, Settings())
    found = look(root, Wanted("embed", "embed", Settings(workers=4)), {}, NOW)
    assert (found.state, found.done, found.total, found.rows, found.bytes) == ("finished", 2, 2, 150, 14)
    assert (found.rows_per_s, found.reasons) == (pytest.approx(150 / made.seconds), {"timeout": 1})


def test_a_resumed_stage_counts_the_shards_of_its_last_run(root: Root) -> None:
    write_stage(root, "embed", {}, Settings())
    ended = root.local_path("embed/manifest.json").stat().st_mtime
    write_records(root, "embed", numbered(4), ended=ended - 1, every=25)  # two of the four in the last 30 s
    found = look(root, Wanted("embed", "embed", Settings()), {}, ended)
    assert found.rows_per_s == pytest.approx(150 / 2 / 30)


def test_other_settings_make_a_stage_stale_and_are_named(root: Root) -> None:
    write_stage(root, "embed", {}, Settings())
    found = look(root, Wanted("embed", "embed", Settings(k=4)), {}, NOW)
    assert (found.state, found.note) == ("stale", "made with k = 8, the recipe has 4")


def test_other_inputs_make_a_stage_stale_and_so_do_stale_ones(root: Root) -> None:
    first = write_stage(root, "download", {}, Settings())
    write_stage(root, "embed", {"download": first.identity}, Settings())
    wanted, download = Wanted("embed", "embed", Settings()), Status("download", "finished")
    assert look(root, wanted, {"download": (download, first)}, NOW).state == "finished"
    other = replace(first, fingerprint="another")
    assert look(root, wanted, {"download": (download, other)}, NOW).note == "made from another download"
    stale = look(root, wanted, {"download": (replace(download, state="stale"), first)}, NOW)
    assert (stale.state, stale.note) == ("stale", "made from download, which is stale")
    gone = look(root, wanted, {"download": (replace(download, state="unfinished"), None)}, NOW)
    assert gone.note == "download, which it was made from, is unfinished"


def test_an_object_store_is_read_as_a_disk_is() -> None:
    root = Root("memory://status-test/run")
    root.write_json("embed/started.json", {"fingerprint": "print"})
    for shard in numbered(3):
        write_record(root, "embed", "print", ShardRecord(shard, 10, ()))
    now = datetime.now(UTC).timestamp()
    found = look(root, Wanted("embed", "embed", None, {"": 5}), {}, now)
    assert (found.state, found.done, found.total, found.rows) == ("unfinished", 3, 5, 30)
    assert found.note == "last shard 0 s ago"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (42.4, "42 s"), (180, "3 min"), (18_700, "5 h 12 min"), (360_000, "4 d 4 h")],
)
def test_durations_are_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
