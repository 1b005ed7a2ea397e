from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.download.former_shards import former_shards, rows_in, set_aside
from pipeline.filter.piece_numbers import remember_pieces
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, IMAGE_ID, write_table


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


def test_records_of_other_pieces_are_read_only_for_rows_that_the_own_piece_lacks(tmp_path: Path) -> None:
    root = Root(tmp_path)
    remember_pieces(root, {"00000": "a", "00001": "a"})
    for number in range(3):  # parts 0 and 1 of piece 0, and part 0 of piece 1
        shard = f"train/{number // 2:05}-{number % 2:05}"
        required = {
            field.name: "" if pa.types.is_string(field.type) else 0 for field in DOWNLOADED if not field.nullable
        }
        table = pa.Table.from_pylist([required | {IMAGE_ID: number}], DOWNLOADED)
        set_aside(root, [ShardRecord(shard, 1, (write_table(root, f"download/{shard}.parquet", table, DOWNLOADED),))])
    for file in tmp_path.glob("download/records/former/train/00001/*"):
        file.write_text("no JSON")
    rows, used = rows_in(root, former_shards(root, "train/00000-00000"), [0, 1])
    assert ({*rows}, [record.shard for record in used]) == ({0, 1}, ["train/00000-00000", "train/00000-00001"])
    with pytest.raises(UserError, match="not valid JSON"):
        rows_in(root, former_shards(root, "train/00000-00000"), [0, 1, 2])


def test_without_former_shards_there_are_no_records(tmp_path: Path) -> None:
    assert not [*former_shards(Root(tmp_path), "train/00000-00000")]
