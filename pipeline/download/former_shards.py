"""Finished shards of an earlier selection, whose pictures the present selection may have in other shards.

A changed filter moves rows between the shards of a metadata file. So the records of outdated shards are moved to
`download/records/former/`, and their files stay, until the stage ends. Each shard takes its stored rows and pictures
from the former shards of its file.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.filter.piece_numbers import known_pieces
from pipeline.pictures.tars import picture_reader
from pipeline.runtime.stage import map_in_threads
from retrieval.storage.manifest import ShardRecord, read_record, record_file
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, IMAGE_ID, read_table, sample_key

FOLDER = "former"
"""Folder of the records, below that of all records."""
CACHED_TABLES = 2_048
"""Tables whose ids a worker keeps in memory, 80 kB each: more than a metadata file of 18 million rows has shards."""


def set_aside(root: Root, outdated: Sequence[ShardRecord]) -> None:
    """Copy the records of outdated shards to the former ones. The caller deletes the originals."""

    def copy(record: ShardRecord) -> None:
        name = f"{FOLDER}/{_piece(record.shard)}/{record.shard.rpartition('/')[2]}.{record.digest}"
        root.write_json(record_file("download", name), {"fingerprint": "", **asdict(record)})

    map_in_threads(copy, outdated)


def former_shards(root: Root, shard: str) -> Iterator[ShardRecord]:
    """The former shards of the same metadata file, nearest first: that of the same name, its piece, other pieces.

    The records of other pieces are read when those of the own piece are used up: a large file has 1,800 shards.
    """
    if not root.exists(f"download/records/{FOLDER}"):
        return
    own, part = _numbers(shard)
    for piece in sorted(_pieces_of_file(root, _piece(shard)), key=lambda piece: abs(_numbers(piece)[0] - own)):
        records = _read(root, root.list(f"download/records/{FOLDER}/{piece}"))
        yield from sorted(records, key=lambda record: abs(_numbers(record.shard)[1] - part))


def _pieces_of_file(root: Root, piece: str) -> list[str]:
    """This piece and all others that its metadata file ever had: a file is divided anew for other `rows_per_piece`."""
    split, _, number = piece.rpartition("/")
    files = known_pieces(root)
    of_file = {name for name, file in files.items() if file == files.get(number)}
    return [f"{split}/{name}" for name in sorted({number, *of_file})]


def rows_in(
    root: Root, records: Iterable[ShardRecord], ids: Iterable[int]
) -> tuple[dict[int, dict[str, Any]], list[ShardRecord]]:
    """The rows of DOWNLOADED with these ids, by id, and the records of the shards that have some of them.

    records: in the order in which they are read, until all rows are there.
    """
    missing = set(ids)
    rows: dict[int, dict[str, Any]] = {}
    used: list[ShardRecord] = []
    for record in records if missing else ():
        name = record.file(".parquet")
        if used and missing.isdisjoint(_ids(root, name).tolist()):
            continue
        table = read_table(root, name, DOWNLOADED)
        rows |= {row[IMAGE_ID]: row for row in table.to_pylist() if row[IMAGE_ID] in missing}
        missing -= rows.keys()
        used.append(record)
        if not missing:  # before the next record: it may be that of another piece
            break
    return rows, used


@contextmanager
def stored_pictures(root: Root, records: Iterable[ShardRecord]) -> Iterator[Callable[[int], bytes]]:
    """A function that reads the picture of an image id from the tars of these shards."""
    with ExitStack() as stack:
        paths = [stack.enter_context(root.local(record.file(".tar"))) for record in records]
        readers = [stack.enter_context(picture_reader(path)) for path in paths]

        def read(image_id: int) -> bytes:
            for reader in readers:
                try:
                    return reader(sample_key(image_id))
                except KeyError:
                    continue
            raise KeyError(image_id)

        yield read


def delete_former(root: Root, records: Iterable[ShardRecord]) -> None:
    """Delete the former shards. Files that the present records name stay."""
    names = root.list(f"download/records/{FOLDER}")
    named = {file.name for record in records for file in record.files}
    root.delete_files({file.name for record in _read(root, names) for file in record.files} - named)
    root.delete(f"download/records/{FOLDER}")


def _read(root: Root, names: Iterable[str]) -> list[ShardRecord]:
    shards = [name.removeprefix("download/records/").removesuffix(".json") for name in names]
    return [stored[1] for stored in map_in_threads(partial(read_record, root, "download"), shards) if stored]


def _piece(shard: str) -> str:
    """The split and the piece of a shard: `train/00000` for `train/00000-00003`."""
    return shard.partition("-")[0]


def _numbers(shard: str) -> tuple[int, int]:
    """The numbers of the piece and of the part: 0 and 3 for `train/00000-00003`."""
    piece, _, part = shard.rpartition("/")[2].partition("-")
    return int(piece), int(part or 0)


@lru_cache(CACHED_TABLES)
def _ids(root: Root, name: str) -> npt.NDArray[np.int64]:
    return np.asarray(read_table(root, name, DOWNLOADED, [IMAGE_ID])[IMAGE_ID].to_numpy())
