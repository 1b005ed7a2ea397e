from pathlib import Path

import pytest

from pipeline.download.former_shards import former_shards, set_aside
from pipeline.filter.piece_numbers import remember_pieces
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Former shards of a file with the pieces 0, 1 and 2, and of another file with piece 3."""
    root = Root(tmp_path)
    remember_pieces(root, {"00000": "a", "00001": "a", "00002": "a", "00003": "b"})
    names = [f"train/{piece:05}-{part:05}" for piece in range(4) for part in range(3)]
    set_aside(root, [ShardRecord(name, 1, ()) for name in names])
    return root


def test_former_shards_of_the_file_come_in_order_of_their_distance(root: Root) -> None:
    assert [record.shard.removeprefix("train/") for record in former_shards(root, "train/00002-00001")] == [
        f"{piece:05}-{part:05}" for piece in (2, 1, 0) for part in (1, 0, 2)
    ]


def test_records_of_other_pieces_are_read_after_those_of_the_own_piece(root: Root, tmp_path: Path) -> None:
    for file in tmp_path.glob("download/records/former/train/00001/*"):
        file.write_text("no JSON")
    former = former_shards(root, "train/00000-00000")
    assert [next(former).shard for _ in range(3)] == [f"train/00000-{part:05}" for part in range(3)]
    with pytest.raises(UserError, match="not valid JSON"):
        next(former)


def test_without_former_shards_there_are_no_records(tmp_path: Path) -> None:
    assert not [*former_shards(Root(tmp_path), "train/00000-00000")]
