"""Downloads one shard.

Reads `filter/<shard>.parquet`; writes `download/<shard>.tar` (WebDataset, rows in the filter's order) and
`download/<shard>.parquet` (DOWNLOADED: a row for every URL). Equal answers of the servers give equal files.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from pipeline.download.image_download import URL_BLOCKED, ImageDownload, PictureBuffer, RowStatus, SplitSettings, Stated
from pipeline.pictures.tars import tar_writer
from pipeline.web.blocklist import Blocklist
from pipeline.web.fetch import Fetcher
from pipeline.web.host_leases import Renew, leased_hosts
from pipeline.web.host_queue import HostQueue
from retrieval.storage.full_disk import full_disk_named
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import (
    DOWNLOADED,
    FROM_METADATA,
    SELECTED,
    TAR_BYTES,
    TAR_OFFSET,
    Reason,
    read_table,
    sample_key,
    write_table,
)
from retrieval.storage.temp_folders import temporary_folder

ReadPicture = Callable[[int], bytes]
"""Returns the stored picture of a row, by the number of the row."""
NOT_IN_TAR = ("reason", "message", "checksum", "face_boxes", TAR_OFFSET, TAR_BYTES)
"""Columns of DOWNLOADED that say nothing of a stored image: its SHA-256 is another column, its faces are blurred."""
Row = dict[str, Any]
"""A row of DOWNLOADED."""
Rows = list[Row]
"""The rows of a shard, in the filter's order."""


class ShardDownload:
    """Downloads shards by name, for one worker process. Connections are kept between shards.

    renew: leases of busy hosts, for limits over all shards; None: limits hold for each shard alone.
    """

    def __init__(
        self, root: Root, fetcher: Fetcher, settings: dict[str, SplitSettings], renew: Renew | None = None
    ) -> None:
        self.root = root
        self.fetcher = fetcher
        self.settings = settings
        self.renew = renew
        self._resume_at: dict[str, float] = {}
        cv2.setNumThreads(1)  # a worker has one CPU

    def __call__(self, shard: str) -> ShardRecord:
        """Download a shard such as `train/00000-00000`. Raises UserError if almost no URL was answered."""
        selected = read_table(self.root, f"filter/{shard}.parquet", SELECTED)
        with self.download_rows(selected, self.settings[shard.partition("/")[0]]) as (rows, read_picture):
            with self.root.writing(f"download/{shard}.tar") as tar:
                write_tar(tar.path, rows, read_picture)
            return write_rows(self.root, shard, rows, tar.record)

    @contextmanager
    def download_rows(self, selected: pa.Table, settings: SplitSettings) -> Iterator[tuple[Rows, ReadPicture]]:
        """Download rows of SELECTED or DOWNLOADED. The stored pictures can be read until the block ends."""
        blocked = blocked_urls(selected, settings.blocklist)
        urls = ((row, url) for row, url in enumerate(selected["url"].to_pylist()) if row not in blocked)
        queue = HostQueue(urls, self.fetcher.settings.host_limits, self._resume_at)
        with ExitStack() as stack:
            path = stack.enter_context(temporary_folder()) / "pictures"
            stack.enter_context(full_disk_named(path))
            file = stack.enter_context(path.open("w+b"))
            pictures = PictureBuffer(file)
            stated = [*map(Stated, selected["checksum"].to_pylist(), selected["face_boxes"].to_pylist())]
            download = ImageDownload(self.fetcher, queue, settings, pictures, stated)
            with leased_hosts(queue, self.renew) if self.renew else nullcontext():
                download.run(selected.num_rows - len(blocked))
            download.statuses |= dict.fromkeys(blocked, RowStatus(str(Reason.BLOCKED), URL_BLOCKED))
            download.check_network()
            columns = selected.select(FROM_METADATA).to_pylist()
            yield [row | vars(download.statuses[number]) for number, row in enumerate(columns)], pictures.read


def write_rows(root: Root, shard: str, rows: Rows, tar: FileRecord) -> ShardRecord:
    """Write the status table of a shard, named as its tar. Returns the record of both files."""
    table = pa.Table.from_pylist(rows, DOWNLOADED)
    file = write_table(root, f"{tar.name.removesuffix('.tar')}.parquet", table, DOWNLOADED)
    reasons = Counter(row["reason"] for row in rows)
    num_stored = reasons.pop("", 0)
    blurred = sum(bool(row.get("face_boxes")) for row in rows if not row["reason"])
    values: dict[str, float] = {"urls": len(rows)}
    if blurred:
        values["with_blurred_faces"] = blurred
    return ShardRecord(shard, num_stored, (tar, file), dict(reasons), values)


def write_tar(path: Path, rows: Rows, read_picture: ReadPicture) -> None:
    """Write the tar of the rows with a stored image, in their order. Sets TAR_OFFSET and TAR_BYTES of all rows."""
    with tar_writer(path) as tar:
        for number, row in enumerate(rows):
            row |= {TAR_OFFSET: None, TAR_BYTES: None}
            if row["reason"]:
                continue
            picture = read_picture(number)
            metadata = {name: value for name, value in row.items() if name not in NOT_IN_TAR}
            row[TAR_OFFSET] = tar.add(sample_key(row["image_id"]), picture, row["caption"], metadata)
            row[TAR_BYTES] = len(picture)


def blocked_urls(selected: pa.Table, blocklist: Blocklist) -> set[int]:
    """Numbers of the rows with a URL, domain or id on the blocklist."""
    ids = selected["image_id"].to_numpy()
    urls = selected["url"].combine_chunks()
    return set(np.flatnonzero(blocklist.blocks_ids(ids) | blocklist.blocks_hosts(urls)).tolist())
