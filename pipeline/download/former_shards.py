"""Finished shards of an earlier selection, whose pictures the present selection may have in other shards.

A changed filter moves rows between the shards of a piece. So the records of outdated shards are moved to
`download/records/former/`, and their files stay, until the stage ends. Each shard takes its stored rows and pictures
from the former shards of its piece.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.pictures.tars import picture_reader
from pipeline.runtime.stage import map_in_threads
from retrieval.storage.manifest import ShardRecord, read_record, record_file
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, IMAGE_ID, read_table, sample_key

FOLDER = "former"
"""Folder of the records, below that of all records."""
CACHED_TABLES = 512
"""Tables whose ids a worker keeps in memory, 80 kB each: more than a piece has shards."""


def set_aside(root: Root, outdated: Sequence[ShardRecord]) -> None:
    """Copy the records of outdated shards to the former ones. The caller deletes the originals."""

    def copy(record: ShardRecord) -> None:
        name = f"{FOLDER}/{_piece(record.shard)}/{record.shard.rpartition('/')[2]}.{record.digest}"
        root.write_json(record_file("download", name), {"fingerprint": "", **asdict(record)})

    map_in_threads(copy, outdated)


def former_shards(root: Root, shard: str) -> list[ShardRecord]:
    """The former shards of the same piece, that of the same name first, then those with the nearest number."""
    names = root.list(f"download/records/{FOLDER}/{_piece(shard)}")
    records = _read(root, names)
    numbers = {record.shard: int(record.shard.rpartition("-")[2]) for record in records if "-" in record.shard}
    number = int(shard.rpartition("-")[2]) if "-" in shard else 0
    return sorted(records, key=lambda record: (record.shard != shard, abs(numbers.get(record.shard, 0) - number)))


def rows_in(
    root: Root, records: Iterable[ShardRecord], ids: Iterable[int]
) -> tuple[dict[int, dict[str, Any]], list[ShardRecord]]:
    """The rows of DOWNLOADED with these ids, by id, and the records of the shards that have some of them.

    records: in the order in which they are read, until all rows are there.
    """
    missing = set(ids)
    rows: dict[int, dict[str, Any]] = {}
    used: list[ShardRecord] = []
    for record in records:
        name = record.file(".parquet")
        if not missing or (used and missing.isdisjoint(_ids(root, name).tolist())):
            continue
        table = read_table(root, name, DOWNLOADED)
        rows |= {row[IMAGE_ID]: row for row in table.to_pylist() if row[IMAGE_ID] in missing}
        missing -= rows.keys()
        used.append(record)
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


@lru_cache(CACHED_TABLES)
def _ids(root: Root, name: str) -> npt.NDArray[np.int64]:
    return np.asarray(read_table(root, name, DOWNLOADED, [IMAGE_ID])[IMAGE_ID].to_numpy())
