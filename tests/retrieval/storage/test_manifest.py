"""Fingerprints depend on the settings that change the output; manifests read back as written."""

from pathlib import Path

import pyarrow as pa
import pytest

from retrieval import Root, UserError
from retrieval.config import Config, runtime_setting
from retrieval.storage.manifest import (
    MAX_JSON_SHARDS,
    Manifest,
    ShardRecord,
    ShardTable,
    _digest,
    files_exist,
    fingerprint,
    read_manifest,
    read_record,
    write_manifest,
    write_record,
)
from retrieval.storage.root import FileRecord


class Inner(Config):
    """Nested settings."""

    depth: int = 1
    threads: int = runtime_setting(1)


class Settings(Config):
    """Settings, one of which does not change the output."""

    threshold: float = 0.5
    workers: int = runtime_setting(2)
    inner: Inner = Inner()


def test_runtime_settings_do_not_change_the_fingerprint_and_other_settings_do() -> None:
    base = fingerprint("embed", 1, Settings(), {"download": "a"})
    assert fingerprint("embed", 1, Settings(workers=9, inner=Inner(threads=4)), {"download": "a"}) == base
    others = [
        fingerprint("embed", 1, Settings(threshold=0.6), {"download": "a"}),
        fingerprint("embed", 1, Settings(inner=Inner(depth=2)), {"download": "a"}),
        fingerprint("embed", 2, Settings(), {"download": "a"}),
        fingerprint("embed", 1, Settings(), {"download": "b"}),
        fingerprint("index", 1, Settings(), {"download": "a"}),
    ]
    assert len({base, *others}) == 6


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    shard = ShardRecord("train/00000", 3, (FileRecord("embed/train/00000.parquet", 9, "ab"),), {"too_small": 2})
    manifest = Manifest("embed", 1, "f" * 16, {}, {"a": 1}, (shard, shard), {"dim": 4}, 1.5)
    write_manifest(Root(tmp_path), manifest)
    assert read_manifest(Root(tmp_path), "embed") == manifest
    assert (manifest.rows, manifest.reasons) == (6, {"too_small": 4})
    assert manifest.checksums() == {"embed/train/00000.parquet": "ab"}


@pytest.mark.parametrize(
    ("stage", "command"),
    [
        ("embed", "'make embed'"),
        ("download", r"'make download' \(or 'make import', if that wrote it\)"),
        ("databases/ukiyo-e", "'make database'"),
        ("", r"'make database' \(or 'laion-rdm build', if that wrote it\)"),
        ("runs/small/train", "'make train'"),
        ("neighbors_effort", "'make neighbors'"),
    ],
)
def test_the_advice_for_a_manifest_of_another_version_keeps_the_other_files_and_names_the_command(
    tmp_path: Path, stage: str, command: str
) -> None:
    Root(tmp_path / stage).write_json("manifest.json", {"stage": stage, "shards": []})
    path = f"{tmp_path / stage}/manifest.json"
    message = rf"is not a manifest.* move {path} out of its folder, keep the other files there, and run {command} again"
    with pytest.raises(UserError, match=message):
        read_manifest(Root(tmp_path), stage)


def test_the_files_of_a_record_exist_only_with_their_recorded_sizes(tmp_path: Path) -> None:
    root = Root(tmp_path)
    record = ShardRecord("a/0", 1, (root.write_bytes("s/a/0.bin", b"123"),))
    write_record(root, "s", "print", record)
    assert read_record(root, "s", "a/0") == ("print", record)
    assert files_exist(root, record)
    root.write_bytes("s/a/0.bin", b"12")
    assert not files_exist(root, record)
    assert read_record(root, "s", "a/1") is None


def records(count: int) -> list[ShardRecord]:
    """Records that differ in every field; every third has no files and no reasons."""
    return [
        ShardRecord(
            f"{'train' if number % 2 else 'database'}/{number:05d}",
            number,
            tuple(
                FileRecord(f"s/{number}{end}", number, f"{number}{end}") for end in (".tar", ".parquet")[: number % 3]
            ),
            {"blocked": number, "http": 1} if number % 3 else {},
            {"urls": number / 2},
            number / 4,
            {"filter": f"digest {number}"},
        )
        for number in range(count)
    ]


def test_a_table_of_records_behaves_as_their_tuple() -> None:
    rows = tuple(records(10))
    shards = ShardTable.of(rows)
    assert (tuple(shards), shards, shards[3], shards[-1]) == (rows, rows, rows[3], rows[-1])
    assert (shards[2:7], tuple(shards[1::2])) == (rows[2:7], rows[1::2])
    assert shards != rows[:9]
    assert ShardTable.of(shards[4:])[1] == rows[5]


def test_equal_records_give_equal_tables_in_any_order_of_their_reasons() -> None:
    first, second = ({"blocked": 1, "unsafe": 2}, {"unsafe": 2, "blocked": 1})
    assert ShardTable.of([ShardRecord("a", 1, (), first)]) == ShardTable.of([ShardRecord("a", 1, (), second)])


def test_records_of_many_shards_are_a_parquet_file_and_give_the_same_digests(tmp_path: Path) -> None:
    root, rows = Root(tmp_path), records(MAX_JSON_SHARDS + 1)
    manifest = Manifest("s", 1, "f" * 16, {}, {}, rows, {}, 1.5)
    write_manifest(root, manifest)
    assert root.size("s/manifest.json") < 1000
    stored = read_manifest(root, "s")
    assert stored == manifest
    assert stored.shards == rows
    assert stored.checksums() == {file.name: file.sha256 for row in rows for file in row.files}
    assert stored.digests() == {row.shard: row.digest for row in rows}
    assert stored.identity_of("train/") == _digest([[row.shard, row.digest] for row in rows if "train/" in row.shard])
    assert stored.rows == sum(row.rows for row in rows)
    assert stored.reasons == {"blocked": sum(row.reasons.get("blocked", 0) for row in rows), "http": 667}
    assert stored.bytes == sum(file.bytes for row in rows for file in row.files)


def test_a_new_manifest_replaces_the_records_of_the_earlier_one(tmp_path: Path) -> None:
    root, rows = Root(tmp_path), records(MAX_JSON_SHARDS + 2)
    for count in (MAX_JSON_SHARDS + 1, MAX_JSON_SHARDS + 2, 3):
        write_manifest(root, Manifest("s", 1, "f" * 16, {}, {}, rows[:count], {}, 1.5), "elsewhere")
        assert read_manifest(root, "elsewhere").shards == rows[:count]
        assert len(root.list("elsewhere/shards")) == (count > MAX_JSON_SHARDS)


def test_damaged_or_foreign_records_raise_an_error_with_the_next_step(tmp_path: Path) -> None:
    root = Root(tmp_path)
    write_manifest(root, Manifest("s", 1, "f" * 16, {}, {}, records(MAX_JSON_SHARDS + 1), {}, 1.5))
    head = root.read_json("s/manifest.json")
    root.write_bytes(f"s/{head['shards_file']}", b"PAR1")
    with pytest.raises(
        UserError, match=r"no records of shards.* move .*/s/manifest\.json out of its folder.*run 'make s' again"
    ):
        read_manifest(root, "s")
    root.write_json("s/manifest.json", {**head, "shards_file": "../other.parquet"})
    with pytest.raises(UserError, match=r"\.\./other\.parquet.*run 'make s' again"):
        read_manifest(root, "s")


def test_records_where_a_mask_is_null_are_left_out() -> None:
    table, [first, *_] = ShardTable.of(records(3)), records(3)
    assert list(table.where(pa.array([True, None, False]))) == [first]
    assert list(table.where(pa.array([True, None, None]))) == [first]
    assert table.where(pa.array([True] * 3)) is table
