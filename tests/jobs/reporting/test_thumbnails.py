"""Pictures of a tar for a page."""

from pathlib import Path

import pytest

from jobs.reporting.thumbnails import stored_pictures
from pipeline.pictures.tars import tar_writer
from retrieval.errors import UserError
from retrieval.storage.root import Root
from retrieval.storage.schema import sample_key


def test_a_tar_is_read_up_to_the_last_wanted_picture(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tar_writer(path) as tar:
        for image_id in (-5, 7, 3):
            tar.add(sample_key(image_id), b"jpeg %d" % image_id, "caption", {})
    assert list(stored_pictures(Root(tmp_path), "shard.tar", [3, 99, -5])) == [(-5, b"jpeg -5"), (3, b"jpeg 3")]
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"jpeg 7") + 512] + b"damaged" * 100)
    assert list(stored_pictures(Root(tmp_path), "shard.tar", [7, -5])) == [(-5, b"jpeg -5"), (7, b"jpeg 7")]


def test_a_damaged_tar_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"shard\.tar is no complete tar"):
        list(stored_pictures(Root(tmp_path), "shard.tar", [3]))
