"""Downloads one shard: img2dataset fetches, resizes and writes it in any order, we put it in order.

Reads `filter/<shard>.parquet`; writes `download/<shard>.tar` (WebDataset, rows in the filter's order) and
`download/<shard>.parquet` (schema DOWNLOADED: every URL, stored or not, and why not). Equal answers of the
servers give equal bytes. Imports img2dataset, which takes seconds and 600 MB: workers alone import this.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset import downloader
from img2dataset.writer import WebDatasetSampleWriter

from pipeline import tars
from pipeline.blocklist import Blocklist
from pipeline.fetch import Fetcher
from pipeline.seam import SILENT, Seam, Storing, Stream
from pipeline.turns import Turns
from retrieval.errors import UserError
from retrieval.manifest import ShardRecord
from retrieval.schema import DOWNLOADED, SELECTED, read_table, write_table
from retrieval.scratch import scratch_folder
from retrieval.storage import FileRecord, Root

Pictures = Callable[[int, str], bytes]
"""Gives a stored row's JPEG, by the row's number and its key in the tar."""


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
        with scratch_folder() as folder:
            found = _run_img2dataset(rows, seam, folder)
            _check(shard, rows, found, seam)
            with reading(folder / "0.tar", base=10) as picture:
                yield _facts(rows, found, seam), lambda number, _: picture(number)

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


def _run_img2dataset(rows: pa.Table, seam: Seam, folder: Path) -> list[dict[str, Any]]:
    """Fetch and store all rows below `folder`; what img2dataset says of each, in the order of the rows."""
    feather = folder / "rows.feather"
    with pa.ipc.new_file(str(feather), rows.select(["url"]).schema) as writer:
        writer.write_table(rows.select(["url"]))
    worker = downloader.Downloader(
        sample_writer_class=WebDatasetSampleWriter,
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
    found: list[dict[str, Any]] = pq.read_table(folder / "0.parquet").to_pylist()
    return sorted(found, key=lambda row: int(row["key"]))


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


def _check(shard: str, rows: pa.Table, found: list[dict[str, Any]], seam: Seam) -> None:
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
    if [int(row["key"]) for row in found] != list(range(rows.num_rows)):
        raise RuntimeError(f"img2dataset kept {len(found)} of {rows.num_rows} rows of {shard}")


def _facts(rows: pa.Table, found: list[dict[str, Any]], seam: Seam) -> list[dict[str, Any]]:
    """The rows of DOWNLOADED, in order."""
    columns = rows.select(["image_id", "url", "caption", "license"]).to_pylist()
    facts = []
    for number, (row, theirs) in enumerate(zip(columns, found, strict=True)):
        refusal = seam.refused.get(number)
        sizes = {name: theirs[name] or 0 for name in ("width", "height", "original_width", "original_height")}
        outcome = {
            "reason": str(refusal.reason) if refusal else "",
            "message": refusal.message if refusal else "",
            "sha256": seam.sent.get(number, ""),
            "phash": seam.phashes.get(number, 0),
        }
        facts.append(row | sizes | outcome)
    return facts


def write_tar(path: Path, facts: list[dict[str, Any]], picture: Pictures) -> None:
    """The tar of the rows that were stored, in their order."""
    with tars.writing(path) as tar:
        for number, row in enumerate(facts):
            if row["reason"]:
                continue
            key = tars.key_of(row["image_id"])
            shown = {name: value for name, value in row.items() if name not in ("reason", "message")}
            tar.add(key, picture(number, key), row["caption"], shown)


@contextmanager
def reading(path: Path, base: int) -> Iterator[Callable[[int], bytes]]:
    """The pictures of a tar by the number that their key is, written to this base."""
    places = {int(key, base): place for key, place in tars.places(path, ".jpg").items()}
    with path.open("rb") as file:

        def picture(number: int) -> bytes:
            offset, size = places[number]
            file.seek(offset)
            return file.read(size)

        yield picture
