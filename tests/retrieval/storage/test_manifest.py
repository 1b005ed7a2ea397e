"""Fingerprints depend on the settings that change the output; manifests read back as written."""

from pathlib import Path

import pytest

from retrieval import Root, UserError
from retrieval.config import Config, runtime_setting
from retrieval.storage.manifest import (
    Manifest,
    ShardRecord,
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


def test_a_manifest_of_another_version_raises_an_error_with_the_next_step(tmp_path: Path) -> None:
    Root(tmp_path).write_json("embed/manifest.json", {"stage": "embed", "shards": []})
    with pytest.raises(UserError, match="Remove its folder, run the stage again"):
        read_manifest(Root(tmp_path), "embed")


def test_the_files_of_a_record_exist_only_with_their_recorded_sizes(tmp_path: Path) -> None:
    root = Root(tmp_path)
    record = ShardRecord("a/0", 1, (root.write_bytes("s/a/0.bin", b"123"),))
    write_record(root, "s", "print", record)
    assert read_record(root, "s", "a/0") == ("print", record)
    assert files_exist(root, record)
    root.write_bytes("s/a/0.bin", b"12")
    assert not files_exist(root, record)
    assert read_record(root, "s", "a/1") is None
