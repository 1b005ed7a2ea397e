"""Downloads one shard: img2dataset fetches, resizes and writes it in any order, we put it in order.

Reads `filter/<shard>.parquet`; writes `download/<shard>.tar` (WebDataset, rows in the filter's order) and
`download/<shard>.parquet` (schema DOWNLOADED: every URL, stored or not, and why not). Equal answers of the
servers give equal bytes. Imports img2dataset, which takes seconds and 600 MB: workers alone import this.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset import downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter

from pipeline import tars
from pipeline.fetch import Fetcher
from pipeline.seam import Seam, Stream
from pipeline.sockets import Refusal
from retrieval.errors import UserError
from retrieval.manifest import ShardRecord
from retrieval.schema import DOWNLOADED, SELECTED, Reason, read_table, write_table
from retrieval.storage import Root

SCRATCH = "rdm-download-"
TOO_SMALL = "image too small"


@dataclass(frozen=True)
class Storing:
    """How the pictures of one split are stored. edge: shorter edge to cut down to in px; 0: as it is."""

    edge: int
    min_edge: int
    max_pixels: int
    jpeg_quality: int
    threads: int
    min_success: float


class ShardDownload:
    """The work of one worker process: keeps connections and img2dataset loaded from shard to shard."""

    def __init__(self, root: Root, fetcher: Fetcher, storing: dict[str, Storing]) -> None:
        self.root = root
        self.fetcher = fetcher
        self.storing = storing
        _sweep_scratch()

    def __call__(self, shard: str) -> ShardRecord:
        """Download a shard such as `train/00000-00000`. Raises UserError if nearly no URL gave an answer."""
        rows = read_table(self.root, f"filter/{shard}.parquet", SELECTED)
        storing = self.storing[shard.partition("/")[0]]
        seam = Seam(
            self.fetcher, storing.max_pixels, storing.edge, storing.min_success, patience=4 * storing.threads
        )
        with _scratch() as folder:
            found = _run_img2dataset(rows, storing, seam, folder)
            _check(shard, rows, found, seam)
            facts = _facts(rows, found, seam, storing)
            with self.root.writing(f"download/{shard}.tar") as tar:
                _write_tar(tar.path, folder / "0.tar", facts)
        table = pa.Table.from_pylist(facts, DOWNLOADED)
        file = write_table(self.root, f"download/{shard}.parquet", table, DOWNLOADED)
        reasons = Counter(row["reason"] for row in facts)
        stored = reasons.pop("", 0)
        return ShardRecord(shard, stored, (tar.record, file), dict(reasons), {"urls": rows.num_rows})


def _run_img2dataset(rows: pa.Table, storing: Storing, seam: Seam, folder: Path) -> list[dict[str, Any]]:
    """Fetch and store all rows below `folder`; what img2dataset says of each, in the order of the rows."""
    feather = folder / "rows.feather"
    with pa.ipc.new_file(str(feather), rows.select(["url"]).schema) as writer:
        writer.write_table(rows.select(["url"]))
    worker = downloader.Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=_Resizer(storing),
        thread_count=storing.threads,
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


class _Resizer(Resizer):
    """img2dataset's resizer, but for pictures that keep their bytes, and with the sizes that came."""

    def __init__(self, storing: Storing) -> None:
        super().__init__(
            image_size=storing.edge,
            resize_mode="keep_ratio" if storing.edge else "no",
            resize_only_if_bigger=True,
            encode_quality=storing.jpeg_quality,
        )
        self.min_edge = storing.min_edge

    def __call__(self, img_stream: Stream, blurring_bbox_list: object = None) -> tuple[Any, ...]:
        """Bytes, width, height, original width and height, error message: as the base class gives them."""
        picture = img_stream.picture
        if min(picture.size) < self.min_edge:
            return None, None, None, None, None, TOO_SMALL
        if picture.keeps_bytes:
            return picture.data, *picture.size, *picture.size, None
        data, width, height, _, _, message = super().__call__(img_stream, blurring_bbox_list)
        return data, width, height, *picture.size, message


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
        message = next(iter(seam.refused.values())).message
        raise UserError(
            f"{seam.silent} of {rows.num_rows} URLs gave no answer ({dict(reasons)}), such as {message!r}."
            " The network or the server is down. Mend it and run 'make download' again; finished shards"
            " are kept. If the hosts are gone for good, lower download.min_success."
        )
    # Downloader prints and forgets a row whose writing failed.
    if [int(row["key"]) for row in found] != list(range(rows.num_rows)):
        raise RuntimeError(f"img2dataset kept {len(found)} of {rows.num_rows} rows of {shard}")


def _facts(rows: pa.Table, found: list[dict[str, Any]], seam: Seam, storing: Storing) -> list[dict[str, Any]]:
    """The rows of DOWNLOADED, in order."""
    columns = rows.select(["image_id", "url", "caption", "license"]).to_pylist()
    facts = []
    for number, (row, theirs) in enumerate(zip(columns, found, strict=True)):
        refusal = seam.refused.get(number) or _refusal(theirs, storing)
        sizes = {name: theirs[name] or 0 for name in ("width", "height", "original_width", "original_height")}
        outcome = {
            "reason": str(refusal.reason) if refusal else "",
            "message": refusal.message if refusal else "",
            "sha256": seam.sent.get(number, ""),
        }
        facts.append(row | sizes | outcome)
    return facts


def _refusal(theirs: dict[str, Any], storing: Storing) -> Refusal | None:
    """What the resizer found amiss with a sound picture."""
    if theirs["status"] == "success":
        return None
    if theirs["error_message"] == TOO_SMALL:
        return Refusal(Reason.TOO_SMALL, f"shorter edge below {storing.min_edge} pixels")
    # Pixels that we made ourselves: if they cannot be encoded, the fault is here and not in the data.
    raise RuntimeError(f"img2dataset could not store {theirs['url']}: {theirs['error_message']}")


def _write_tar(path: Path, source: Path, facts: list[dict[str, Any]]) -> None:
    places = {int(key): place for key, place in tars.places(source, ".jpg").items()}
    with source.open("rb") as file, tars.writing(path) as tar:
        for number, row in enumerate(facts):
            if row["reason"]:
                continue
            offset, size = places[number]
            file.seek(offset)
            shown = {name: value for name, value in row.items() if name not in ("reason", "message")}
            tar.add(tars.key_of(row["image_id"]), file.read(size), row["caption"], shown)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}{os.getpid()}-") as folder:
        yield Path(folder)


def _sweep_scratch() -> None:
    """Remove the scratch folders of killed workers of this machine."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdigit() and not _runs(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
