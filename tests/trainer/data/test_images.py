"""Images of a tar that is opened at the offsets which its table states."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.download.shard_download import Rows, write_rows, write_tar
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, IMAGE_ID, TAR_BYTES, TAR_OFFSET, read_table, write_table
from trainer.data import images
from trainer.data.images import ImageTar, stored_members

TAR = "download/train/00000-00001.tar"
ROWS, PICTURE_BYTES = 300, 20_000


def write_shard(root: Root) -> dict[int, bytes]:
    """A shard in which every fifth row has no picture. Returns the pictures by image_id."""
    rng = np.random.default_rng(0)
    content = [rng.bytes(PICTURE_BYTES + number) for number in range(ROWS)]
    text = {"url": "http://example.org", "caption": "a caption", "message": "", "sha256": ""}
    sizes = dict.fromkeys(("width", "height", "original_width", "original_height", "phash"), 64)
    rows: Rows = [
        {IMAGE_ID: number - 7, "reason": "" if number % 5 else "timeout", **text, **sizes} for number in range(ROWS)
    ]
    with root.writing(TAR) as pending:
        write_tar(pending.path, rows, content.__getitem__)
    write_rows(root, "train/00000-00001", rows, pending.record)
    return {number - 7: content[number] for number in range(ROWS) if number % 5}


def bytes_read() -> int:
    """Bytes that this thread has read from files."""
    return int(Path("/proc/thread-self/io").read_text().split()[1])


def test_a_tar_is_opened_at_the_stored_offsets_without_reading_more_than_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path)
    content = write_shard(root)
    scanned = ImageTar(root.local_path(TAR))
    monkeypatch.setattr(images.tarfile, "open", None)
    before = bytes_read()
    tar = ImageTar(root.local_path(TAR), stored_members(root, TAR))
    assert {image_id: tar.read(image_id) for image_id in content} == content
    assert bytes_read() - before < 1.1 * sum(map(len, content.values()))
    assert {image_id: scanned.read(image_id) for image_id in content} == content
    table = read_table(root, TAR.replace(".tar", ".parquet"), DOWNLOADED)
    assert table[TAR_OFFSET].is_null().to_pylist() == [number % 5 == 0 for number in range(ROWS)]


def test_a_tar_of_an_earlier_version_and_one_without_a_table_are_scanned(tmp_path: Path) -> None:
    root = Root(tmp_path)
    content = write_shard(root)
    name = TAR.replace(".tar", ".parquet")
    earlier = read_table(root, name, DOWNLOADED).drop_columns([TAR_OFFSET, TAR_BYTES])
    write_table(root, name, earlier, earlier.schema)
    for _ in range(2):
        assert stored_members(root, TAR) == {}
        tar = ImageTar(root.local_path(TAR), stored_members(root, TAR))
        assert {image_id: tar.read(image_id) for image_id in content} == content
        root.delete(name)
