"""Downloads one shard: img2dataset's Downloader runs the threads; fetching, pictures and writing are ours.

Reads `filter/<shard>.parquet`; writes `download/<shard>.tar` (WebDataset, rows in the filter's order) and
`download/<shard>.parquet` (schema DOWNLOADED: every URL, stored or not, and why not). Equal answers of the
servers give equal bytes.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import pyarrow as pa

from pipeline.download import tars
from pipeline.download.img2dataset_adapter import SILENT, Seam, Storing, Stream
from pipeline.download.img2dataset_downloader import downloader
from pipeline.web.blocklist import Blocklist
from pipeline.web.fetch import Fetcher
from pipeline.web.host_queue import Turns
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import DOWNLOADED, SELECTED, read_table, write_table
from retrieval.storage.temp_folders import scratch_folder

Pictures = Callable[[int], bytes]
"""Gives a stored row's JPEG, by the row's number."""
SIZES = ("width", "height", "original_width", "original_height")


class Shelf:
    """In the place of img2dataset's writer: one file of pictures in the order of their coming, found by row.

    The tar wants them in the order of the rows, so a tar of img2dataset's would be read once and thrown away.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[int, tuple[int, int]] = {}
        self.sizes: dict[int, dict[str, int]] = {}

    def __call__(self, *_arguments: object) -> "Shelf":
        """Downloader makes its own writer, of a class that it is given."""
        return self

    def write(self, img_str: bytes | None, key: str, _caption: str | None, meta: dict[str, Any]) -> None:
        """Take a row: its JPEG, or None where none came, and img2dataset's facts of it."""
        number = int(key)
        if img_str is not None:
            place = self._file.tell(), len(img_str)
            self._file.write(img_str)
            self._places[number] = place
        # Last: a row that is not here was not kept, since Downloader goes on after an error.
        self.sizes[number] = {name: meta[name] or 0 for name in SIZES}

    def close(self) -> None:
        """Let what was written be read."""
        self._file.flush()

    def picture(self, number: int) -> bytes:
        """The JPEG of a row."""
        offset, size = self._places[number]
        return os.pread(self._file.fileno(), size, offset)


class ShardDownload:
    """The work of one worker process: keeps connections and img2dataset loaded from shard to shard."""

    def __init__(self, root: Root, fetcher: Fetcher, storing: dict[str, Storing]) -> None:
        self.root = root
        self.fetcher = fetcher
        self.storing = storing
        self.open_at: dict[str, float] = {}
        cv2.setNumThreads(1)  # a worker has one CPU

    def __call__(self, shard: str) -> ShardRecord:
        """Download a shard such as `train/00000-00000`. Raises UserError if nearly no URL gave an answer."""
        rows = self.selected(shard)
        with self.fetched(shard, rows, self.storing[shard.partition("/")[0]]) as (facts, picture):
            with self.root.writing(f"download/{shard}.tar") as tar:
                write_tar(tar.path, facts, picture)
            return self.recorded(shard, facts, tar.record)

    def selected(self, shard: str) -> pa.Table:
        """The rows that filter kept for a shard."""
        return read_table(self.root, f"filter/{shard}.parquet", SELECTED)

    @contextmanager
    def fetched(
        self, shard: str, rows: pa.Table, storing: Storing
    ) -> Iterator[tuple[list[dict[str, Any]], Pictures]]:
        """Rows of DOWNLOADED in their order, and while the block lasts the pictures of those stored."""
        manners = self.fetcher.manners
        barred = _barred(rows, storing.blocklist)
        allowed = ((n, url) for n, url in enumerate(rows["url"].to_pylist()) if n not in barred)
        turns = Turns(allowed, manners.courtesy, self.open_at)
        seam = Seam(self.fetcher, turns, storing, deque(barred))
        with scratch_folder() as folder, (folder / "pictures").open("w+b") as file:
            shelf = Shelf(file)
            _run_img2dataset(rows, seam, shelf, folder)
            _check(shard, rows, shelf, seam)
            yield _facts(rows, shelf, seam), shelf.picture

    def recorded(self, shard: str, facts: list[dict[str, Any]], tar: FileRecord) -> ShardRecord:
        """Write the status table of a shard whose tar is written; the record of both."""
        table = pa.Table.from_pylist(facts, DOWNLOADED)
        file = write_table(self.root, f"download/{shard}.parquet", table, DOWNLOADED)
        reasons = Counter(row["reason"] for row in facts)
        stored = reasons.pop("", 0)
        return ShardRecord(shard, stored, (tar, file), dict(reasons), {"urls": len(facts)})


def _barred(rows: pa.Table, blocklist: Blocklist) -> set[int]:
    """Numbers of the rows whose URL, domain or id is listed."""
    ids = rows["image_id"].to_numpy()
    urls = rows["url"].combine_chunks()
    return set(np.flatnonzero(blocklist.blocks_ids(ids) | blocklist.blocks_hosts(urls)).tolist())


def _run_img2dataset(rows: pa.Table, seam: Seam, shelf: Shelf, folder: Path) -> None:
    """Fetch all rows and put them on the shelf. folder: for the files that img2dataset wants."""
    feather = folder / "rows.feather"
    with pa.ipc.new_file(str(feather), rows.select(["url"]).schema) as writer:
        writer.write_table(rows.select(["url"]))
    worker = downloader.Downloader(
        sample_writer_class=shelf,
        resizer=_as_it_comes,
        thread_count=seam.storing.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=0,
        number_sample_per_shard=rows.num_rows,
        oom_shard_count=1,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    # Not by calling the object, which would turn every failure into a line on stdout.
    with plugged_in(seam):
        worker.download_shard((0, str(feather)))


def _as_it_comes(img_stream: Stream, blurring_bbox_list: object = None) -> tuple[Any, ...]:
    """In the place of img2dataset's resizer: bytes, width, height, original width and height, no error."""
    jpeg = img_stream.jpeg
    return jpeg.data, *jpeg.size, *jpeg.original_size, None


@contextmanager
def plugged_in(seam: Seam) -> Iterator[None]:
    """While this lasts, img2dataset's Downloader fetches through the seam. One at a time in a process."""
    theirs = downloader.download_image_with_retry
    downloader.download_image_with_retry = seam
    try:
        yield
    finally:
        downloader.download_image_with_retry = theirs


def _check(shard: str, rows: pa.Table, shelf: Shelf, seam: Seam) -> None:
    if seam.defect:
        raise seam.defect
    if seam.is_down:
        reasons = Counter(str(refusal.reason) for refusal in seam.refused.values())
        message = next(refusal.message for refusal in seam.refused.values() if refusal.reason in SILENT)
        raise UserError(
            f"{seam.silent} of {rows.num_rows} URLs gave no answer ({dict(reasons)}), such as {message!r}."
            " The network or the server is down. Mend it and run 'make download' again; finished shards"
            " are kept. If the hosts are gone for good, lower download.min_success."
        )
    # Downloader prints and forgets a row whose writing failed.
    if len(shelf.sizes) != rows.num_rows:
        raise RuntimeError(f"img2dataset kept {len(shelf.sizes)} of {rows.num_rows} rows of {shard}")


def _facts(rows: pa.Table, shelf: Shelf, seam: Seam) -> list[dict[str, Any]]:
    """The rows of DOWNLOADED, in order."""
    columns = rows.select(["image_id", "url", "caption", "license"]).to_pylist()
    facts = []
    for number, row in enumerate(columns):
        refusal = seam.refused.get(number)
        outcome = {
            "reason": str(refusal.reason) if refusal else "",
            "message": refusal.message if refusal else "",
            "sha256": seam.sent.get(number, ""),
            "phash": seam.phashes.get(number, 0),
        }
        facts.append(row | shelf.sizes[number] | outcome)
    return facts


def write_tar(path: Path, facts: list[dict[str, Any]], picture: Pictures) -> None:
    """The tar of the rows that were stored, in their order."""
    with tars.writing(path) as tar:
        for number, row in enumerate(facts):
            if row["reason"]:
                continue
            shown = {name: value for name, value in row.items() if name not in ("reason", "message")}
            tar.add(tars.key_of(row["image_id"]), picture(number), row["caption"], shown)
