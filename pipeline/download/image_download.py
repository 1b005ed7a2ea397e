"""Downloads the images of one shard in many threads: fetch, check, decode, store.

Takes requests from a HostQueue; gives a status for each row, and the encoded pictures in a PictureBuffer. img2dataset's
Downloader is not used: it opens file:// URLs and private addresses, limits neither bytes nor total time, retries
permanent errors, and continues after an error without the row.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from pipeline.pictures.faces import Box, parse_boxes
from pipeline.pictures.picture import StoredPicture, encode, prepare
from pipeline.recipe import ImageFormat
from pipeline.web.blocklist import Blocklist
from pipeline.web.fetch import Fetcher
from pipeline.web.fetch_error import FetchError
from pipeline.web.host_queue import HOST_SILENT, NO_ANSWER, STOPPED, FetchRequest, HostQueue
from retrieval.errors import NodeError
from retrieval.pictures.decode import PictureError
from retrieval.storage.schema import Reason

MIN_JUDGED_URLS = 5
URL_BLOCKED = "its URL, domain or id is on the blocklist"
CONTENT_BLOCKED = "its content is on the blocklist"
PHASH_BLOCKED = "its perceptual hash is on the blocklist"

# Decoding takes up to several hundred MB, which the allocator keeps for the thread that used it. So all images are
# decoded in two threads (one decodes while the other holds the interpreter lock), not in every fetch thread.
_DECODERS = ThreadPoolExecutor(2)


@dataclass(frozen=True)
class SplitSettings:
    """How images of one split are fetched and stored. edge: shorter edge of a stored image in px; 0: keep."""

    edge: int
    min_edge: int
    max_pixels: int
    quality: int
    threads: int
    min_answered: float
    max_aspect_ratio: float = 0.0
    image_format: ImageFormat = "jpeg"
    blocklist: Blocklist = field(default_factory=Blocklist)


@dataclass(frozen=True)
class Stated:
    """What the metadata states of a picture. checksum, face_boxes: as in SELECTED."""

    checksum: str | None = None
    face_boxes: str | None = None


@dataclass
class RowStatus:
    """The columns of DOWNLOADED that the download of a URL fills."""

    reason: str = ""
    message: str = ""
    width: int = 0
    height: int = 0
    original_width: int = 0
    original_height: int = 0
    sha256: str = ""
    phash: int = 0


def check_checksum(body: bytes, stated: str | None) -> None:
    """Raises PictureError if a body differs from the checksum that the metadata state, `sha256:` or `md5:` and hex."""
    if stated:
        algorithm, _, digits = stated.partition(":")
        computed = hashlib.new(algorithm, body, usedforsecurity=False).hexdigest()
        if computed != digits:
            message = f"its {algorithm} is {computed}, not {digits} as in the metadata"
            raise PictureError(Reason.CHECKSUM_MISMATCH, message)


class PictureBuffer:
    """Encoded pictures of a shard in a temporary file, added in any order by any thread, then read by row."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._ranges: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def add(self, row: int, picture: bytes) -> None:
        """Append the picture of a row."""
        with self._lock:
            self._ranges[row] = self._file.tell(), len(picture)
            self._file.write(picture)

    def read(self, row: int) -> bytes:
        """The picture of a row. Call it after all rows are added."""
        offset, size = self._ranges[row]
        self._file.seek(offset)
        return self._file.read(size)


class ImageDownload:
    """Downloads the rows of a queue. statuses: of the finished rows, by number of the row.

    stated: by number of the row.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        queue: HostQueue,
        settings: SplitSettings,
        pictures: PictureBuffer,
        stated: Sequence[Stated],
    ) -> None:
        self.statuses: dict[int, RowStatus] = {}
        self.finished = 0
        self.unanswered = 0
        self._fetcher = fetcher
        self._queue = queue
        self._settings = settings
        self._pictures = pictures
        self._lock = threading.Lock()
        self._stated = stated

    def run(self, num_rows: int) -> None:
        """Download all rows of the queue. If the network is down, the rest is not requested.

        Raises an exception of a thread that is not a FetchError or PictureError; then the rest is not requested.
        """
        rows = iter(range(num_rows))
        with ThreadPoolExecutor(self._settings.threads) as pool:
            for loop in [pool.submit(self._finish_rows, rows) for _ in range(min(self._settings.threads, num_rows))]:
                loop.result()

    @property
    def is_down(self) -> bool:
        """True if so few URLs were answered that the network must be down."""
        answered = self.finished - self.unanswered
        return self.finished >= MIN_JUDGED_URLS and answered < self._settings.min_answered * self.finished

    def check_network(self) -> None:
        """Raises NodeError if the network was down."""
        if not self.is_down:
            return
        failures = [status for status in self.statuses.values() if status.reason]
        reasons = dict(Counter(status.reason for status in failures))
        # Some were not requested, because of the failures of others.
        messages = [status.message for status in failures if status.reason in NO_ANSWER]
        message = min(messages, key=lambda text: text in (HOST_SILENT, STOPPED))
        raise NodeError(
            f"{self.unanswered} of {len(self.statuses)} URLs gave no answer ({reasons}), for example {message!r}. The"
            " network or the server is down. Repair it and run 'make download' again; finished shards are kept. If"
            " the hosts are gone for good, lower download.min_answered."
        )

    def _finish_rows(self, rows: Iterator[int]) -> None:
        """Finish a row for each number of an iterator that all threads share."""
        for _ in rows:
            self._finish_row()

    def _finish_row(self) -> None:
        """Send requests until one row, of any number, has an answer; store its image and its status."""
        try:
            answer: bytes | FetchError | None = None
            while answer is None:
                request, error = self._queue.take()
                answer = error or self._answer(request)
            self._count(answer)
            if isinstance(answer, FetchError):
                self.statuses[request.row] = RowStatus(str(answer.reason), str(answer))
            else:
                self.statuses[request.row] = self._store(request.row, answer)
        except BaseException:
            self._queue.stop()  # otherwise the other threads would download the rest of the shard first
            raise

    def _answer(self, request: FetchRequest) -> bytes | FetchError | None:
        """The body of the response, or why there is none; None if the request is in the queue again."""
        if request.redirects and self._settings.blocklist.blocks_url(request.url):
            self._queue.finish(request)
            return FetchError(Reason.BLOCKED, URL_BLOCKED)
        try:
            return self._fetcher.fetch(request, self._queue)
        except FetchError as error:
            return error

    def _count(self, answer: bytes | FetchError) -> None:
        with self._lock:
            self.finished += 1
            self.unanswered += isinstance(answer, FetchError) and answer.reason in NO_ANSWER
            # Four URLs a thread: a few slow hosts at the start of a shard are no evidence.
            if self.finished >= 4 * self._settings.threads and self.is_down:
                self._queue.stop()

    def _store(self, row: int, body: bytes) -> RowStatus:
        status, picture = stored_image(body, self._settings, self._stated[row])
        if picture:
            self._pictures.add(row, picture)
        return status


def stored_image(body: bytes, settings: SplitSettings, stated: Stated | None = None) -> tuple[RowStatus, bytes]:
    """The status of the row of a picture file, and the encoded picture to store; empty if the picture cannot be used.

    Stores nothing, because decoders would wait for the disk.
    """
    stated = stated or Stated()
    status = RowStatus(sha256=hashlib.sha256(body).hexdigest())
    try:
        if settings.blocklist.blocks_content(body):
            raise PictureError(Reason.BLOCKED, CONTENT_BLOCKED)
        check_checksum(body, stated.checksum)
        picture = _DECODERS.submit(_encode, body, status, settings, parse_boxes(stated.face_boxes)).result()
    except PictureError as error:
        status.reason, status.message = str(error.reason), str(error)
        return status, b""
    status.width, status.height = picture.size
    status.original_width, status.original_height = picture.original_size
    return status, picture.data


def _encode(body: bytes, status: RowStatus, settings: SplitSettings, faces: Sequence[Box]) -> StoredPicture:
    """The image as it is stored; adds its perceptual hash to the status. Raises PictureError."""
    picture = prepare(body, settings.max_pixels, settings.edge, faces, settings.image_format)
    status.phash = picture.phash
    if settings.blocklist.blocks_phashes(np.array([picture.phash])).any():
        raise PictureError(Reason.BLOCKED, PHASH_BLOCKED)
    if min(picture.size) < settings.min_edge:
        raise PictureError(Reason.TOO_SMALL, f"shorter edge below {settings.min_edge} pixels")
    if 0 < settings.max_aspect_ratio < max(picture.size) / min(picture.size):
        raise PictureError(Reason.ASPECT_RATIO, f"edges with a ratio above {settings.max_aspect_ratio:g}")
    return encode(picture, settings.quality)
