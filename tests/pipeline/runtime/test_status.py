"""Status of a stage from its manifest and records: progress, rate, time left, and whether it is stale."""

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.runtime.status import (
    StageSpec,
    Status,
    UpstreamStages,
    find_manifest,
    format_duration,
    modified_at,
    stage_status,
)
from retrieval.config import Config, runtime_setting
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, write_manifest, write_record
from retrieval.storage.root import FileRecord, Root

NOW = 2_000_000_000.0


class Settings(Config):
    """Settings of a stage."""

    k: int = 8
    workers: int = runtime_setting(0)


def write_records(root: Root, stage: str, shards: list[str], ended: float, every: float) -> None:
    """Write records of finished shards, `every` seconds apart, the last at `ended`, of 100 rows each."""
    for number, shard in enumerate(shards):
        file = FileRecord(f"{stage}/{shard}.parquet", 1000, "")
        write_record(root, stage, "print", ShardRecord(shard, 100, (file,), {"not_found": 10, "timeout": 1}))
        when = ended - every * (len(shards) - 1 - number)
        os.utime(root.local_path(f"{stage}/records/{shard}.json"), (when, when))


ALL_AGAIN = "all is made again with --remake, 150 rows, 0.0 MB, at least 30 s"
"""What is stated for `write_stage`."""


def write_stage(root: Root, name: str, upstream: dict[str, str], config: Config) -> Manifest:
    """Write the manifest of a finished stage: two shards, 150 rows, 30 seconds."""
    shards = tuple(
        ShardRecord(f"train/{n}", rows, (FileRecord(f"{n}", 7, f"{n}"),), {"timeout": n})
        for n, rows in enumerate((100, 50))
    )
    identity = fingerprint(name, 1, config, upstream)
    manifest = Manifest(name, 1, identity, upstream, config.model_dump(mode="json"), shards, {}, 30.0)
    write_manifest(root, manifest)
    return manifest


def numbered(count: int) -> list[str]:
    return [f"train/{number:05d}" for number in range(count)]


def status(root: Root, spec: StageSpec, upstream: UpstreamStages | None = None, now: float = NOW) -> Status:
    return stage_status(root, spec, find_manifest(root, spec.folder), upstream or {}, now)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def test_a_stage_without_files_has_not_started(root: Root) -> None:
    assert status(root, StageSpec("embed", "embed", Settings())) == Status("embed", "not started")


def test_a_begun_stage_without_records_is_unfinished(root: Root) -> None:
    root.write_json("embed/started.json", {"fingerprint": "print"})
    current = status(root, StageSpec("embed", "embed", None, {"": 12}))
    assert (current.state, current.done, current.total, current.eta_s) == ("unfinished", 0, 12, None)
    assert current.note == "no shard is done yet"


def test_rows_rate_and_time_left_are_computed_from_the_records(root: Root) -> None:
    write_records(root, "download", numbered(20), ended=NOW - 3, every=4)
    write_records(root, "download", ["former/train/00000/00000-00000.0"], ended=NOW - 9, every=4)  # to be updated
    current = status(root, StageSpec("download", "download", None, {"": 50}))
    assert (current.state, current.done, current.total) == ("unfinished", 20, 50)
    assert (current.rows, current.bytes, current.reasons) == (2000, 20_000, {"not_found": 200, "timeout": 20})
    assert current.rows_per_s == pytest.approx(100 / 4)
    assert current.eta_s == pytest.approx(30 * 4)
    assert current.note == "last shard 3 s ago"


def test_the_time_left_is_estimated_from_the_recent_shards(root: Root) -> None:
    write_records(root, "download", numbered(20), ended=NOW - 3, every=1)
    for number in range(12):  # the first shards were slow
        when = NOW - 1000 + number
        os.utime(root.local_path(f"download/records/train/{number:05d}.json"), (when, when))
    current = status(root, StageSpec("download", "download", None, {"": 50}))
    assert current.eta_s == pytest.approx(30 * 1)


def test_a_stalled_stage_has_no_time_left(root: Root) -> None:
    write_records(root, "download", numbered(20), ended=NOW - 600, every=1)
    current = status(root, StageSpec("download", "download", None, {"": 50}))
    assert current.eta_s is None
    assert current.note == "last shard 10 min ago: interrupted, or its shards take long"


def test_few_shards_or_an_unknown_total_give_no_time_left(root: Root) -> None:
    write_records(root, "download", numbered(7), ended=NOW, every=1)
    assert status(root, StageSpec("download", "download", None, {"": 50})).eta_s is None
    write_records(root, "embed", numbered(20), ended=NOW, every=1)
    current = status(root, StageSpec("embed", "embed", None))
    assert (current.total, current.eta_s) == (None, None)


def test_the_sums_of_a_sample_of_records_are_scaled(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.status.MAX_RECORDS", 5)
    write_records(root, "download", numbered(20), ended=NOW, every=1)
    current = status(root, StageSpec("download", "download", None, {"": 50}))
    assert current.is_estimate
    assert (current.done, current.rows, current.bytes, current.reasons["not_found"]) == (20, 2000, 20_000, 200)


def test_a_stage_with_phases_counts_its_current_phase(root: Root) -> None:
    write_records(root, "neighbors", [f"route/{n:05d}" for n in range(6)], ended=NOW - 100, every=1)
    write_records(root, "neighbors", [f"match/{n:05d}" for n in range(9)], ended=NOW, every=2)
    spec = StageSpec("neighbors", "neighbors", None, {"match": 12})
    current = status(root, spec)
    assert (current.phase, current.done, current.total, current.eta_s) == ("match", 9, 12, pytest.approx(3 * 2))
    write_records(root, "neighbors", ["merge/00000"], ended=NOW, every=1)
    current = status(root, spec)
    assert (current.phase, current.done, current.total) == ("merge", 1, 6)


def test_partially_written_records_do_not_count(root: Root) -> None:
    write_records(root, "embed", numbered(2), ended=NOW, every=1)
    (root.local_path("embed/records/train") / ".partial-1-00009.json").write_text("{")
    assert status(root, StageSpec("embed", "embed", None)).done == 2


def test_a_finished_stage_has_the_numbers_of_its_manifest(root: Root) -> None:
    manifest = write_stage(root, "embed", {}, Settings())
    current = status(root, StageSpec("embed", "embed", Settings(workers=4)))
    assert (current.state, current.done, current.total, current.rows, current.bytes) == ("finished", 2, 2, 150, 14)
    assert (current.rows_per_s, current.reasons) == (pytest.approx(150 / manifest.seconds), {"timeout": 1})


def test_a_resumed_stage_counts_the_shards_of_its_last_run(root: Root) -> None:
    write_stage(root, "embed", {}, Settings())
    ended = root.local_path("embed/manifest.json").stat().st_mtime
    write_records(root, "embed", numbered(4), ended=ended - 1, every=25)  # two of the four in the last 30 s
    current = status(root, StageSpec("embed", "embed", Settings()), now=ended)
    assert current.rows_per_s == pytest.approx(150 / 2 / 30)


def test_changed_settings_make_a_stage_stale_and_are_named(root: Root) -> None:
    write_stage(root, "embed", {}, Settings())
    current = status(root, StageSpec("embed", "embed", Settings(k=4)))
    assert (current.state, current.note) == ("stale", f"made with k = 8, the recipe has 4; {ALL_AGAIN}")


def test_changed_or_stale_inputs_make_a_stage_stale(root: Root) -> None:
    first = write_stage(root, "download", {}, Settings())
    write_stage(root, "embed", {"download": first.identity}, Settings())
    spec, download = StageSpec("embed", "embed", Settings()), Status("download", "finished")
    assert status(root, spec, {"download": (download, first)}).state == "finished"
    other = replace(first, fingerprint="another")
    stale = status(root, spec, {"download": (download, other)}).note
    assert stale == f"made from another download: {ALL_AGAIN}"
    made_from_stale = status(root, spec, {"download": (replace(download, state="stale"), first)})
    assert (made_from_stale.state, made_from_stale.note) == ("stale", "made from download, which is stale")
    upstream_unfinished = status(root, spec, {"download": (replace(download, state="unfinished"), None)})
    assert upstream_unfinished.note == "download, which it was made from, is unfinished"


def follow_by_shard(root: Root, stage: str, source: Manifest) -> None:
    """Make each shard of a finished stage follow its shard of `download`. Names without a split are of `train/`."""
    made = write_stage(root, stage, {"download": source.identity}, Settings())
    shards = [
        replace(
            shard,
            shard=shard.shard.removeprefix("train/" if stage == "latents" else ""),
            seconds=7200.0,
            inputs={"download": origin.digest},
        )
        for shard, origin in zip(made.shards, source.shards, strict=True)
    ]
    write_manifest(root, replace(made, shards=tuple(shards)))


@pytest.mark.parametrize("stage", ["embed", "latents"])
def test_a_stage_that_follows_its_input_by_shard_states_what_is_outdated_and_what_is_new(
    root: Root, stage: str
) -> None:
    first = write_stage(root, "download", {}, Settings())
    follow_by_shard(root, stage, first)
    spec, finished = StageSpec(stage, stage, Settings()), Status("download", "finished")
    retried = replace(first.shards[1], files=(FileRecord("1", 7, "another"),))
    other = replace(first, shards=(first.shards[0], retried))
    loss = "1 of 2 shards are outdated, 50 rows, 0.0 MB, 2 h 0 min of one worker"
    assert status(root, spec, {"download": (finished, other)}).note == f"made from another download: {loss}"
    added = ShardRecord("train/2", 75, (FileRecord("2", 7, "2"),))
    dropped = ShardRecord("dropped/0", 0, (), {"timeout": 9})
    grown = replace(first, shards=(*first.shards, added, dropped))
    loss = "0 of 2 shards are outdated and 1 is new, 75 rows, 0.0 MB, 2 h 0 min of one worker"
    assert status(root, spec, {"download": (finished, grown)}).note == f"made from another download: {loss}"


def test_an_object_store_is_read_like_a_disk() -> None:
    root = Root("memory://status-test/run")
    root.write_json("embed/started.json", {"fingerprint": "print"})
    now = datetime.now(UTC).timestamp()
    for shard in numbered(3):
        write_record(root, "embed", "print", ShardRecord(shard, 10, ()))
    current = status(root, StageSpec("embed", "embed", None, {"": 5}), now=now)
    assert (current.state, current.done, current.total, current.rows) == ("unfinished", 3, 5, 30)
    assert current.note == "last shard 0 s ago"


@pytest.mark.parametrize(
    ("seconds", "words"), [(-1, "0 s"), (42.4, "42 s"), (180, "3 min"), (18_700, "5 h 12 min"), (360_000, "4 d 4 h")]
)
def test_durations_are_formatted(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


def test_the_time_of_a_deleted_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet was deleted or renamed while it was read"):
        modified_at(Root(tmp_path), "a.parquet")
