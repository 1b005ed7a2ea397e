"""Where our own fetching takes the place of img2dataset's.

img2dataset's `Downloader` calls a function of its module, `download_image_with_retry(row, ...)`, in many
threads, and gives what it returns to its resizer and writer. That function opens file:// URLs and private
addresses, has no limit of bytes or time, retries whatever fails, and leaves rotated and 16-bit pictures to
be decoded wrongly. `shard_download` puts a `Seam` in its place while one shard is made. Downloader takes
the results in any order and by the number that comes with them, so that `turns` may choose the next URL.
"""

import hashlib
import io
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from pipeline.pictures.picture import Jpeg, Picture, prepared, stored
from pipeline.web.blocklist import Blocklist
from pipeline.web.fetch import Fetcher
from pipeline.web.host_queue import GIVEN_UP, Errand, Turns
from pipeline.web.sockets import Refusal
from retrieval.storage.schema import Reason

SILENT = frozenset({Reason.NO_CONNECTION, Reason.TIMEOUT})
MIN_JUDGED_URLS = 5
BARRED = Refusal(Reason.BLOCKED, "its URL, domain or id is on the blocklist")

# Pixels may take several hundred MB, and what they took stays with the thread that had them. So two threads
# make and encode them all (one waits for the interpreter while the other decodes), the others go on fetching.
_PICTURES = ThreadPoolExecutor(2)


class Stream(io.BytesIO):
    """A picture on its way through Downloader, where up to two for each thread wait."""

    def __init__(self, jpeg: Jpeg) -> None:
        super().__init__(jpeg.data)
        self.jpeg = jpeg


@dataclass(frozen=True)
class Storing:
    """How the pictures of one split are stored. edge: shorter edge to cut down to in px; 0: as it is."""

    edge: int
    min_edge: int
    max_pixels: int
    jpeg_quality: int
    threads: int
    min_success: float
    blocklist: Blocklist = field(default_factory=Blocklist)

    @property
    def patience(self) -> int:
        """URLs that may pass without an answer before the rest of a shard is not tried."""
        return 4 * self.threads


@dataclass
class Seam:
    """Fetches the URLs of one shard; knows of each what came, by its row. sent: SHA-256 of bodies, in hex.

    barred: rows that are refused and no host is asked for; they have no turns.
    """

    fetcher: Fetcher
    turns: Turns
    storing: Storing
    barred: deque[int] = field(default_factory=deque)
    sent: dict[int, str] = field(default_factory=dict)
    phashes: dict[int, int] = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)
    defect: Exception | None = None
    done: int = 0
    silent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, _row: object, **_settings: object) -> tuple[int, Stream | None, str | None]:
        """What `download_image_with_retry` gives: a row's number, and a picture or a message.

        The row is the next one whose turn it is, not the one that Downloader names.
        """
        with suppress(IndexError):
            number = self.barred.popleft()
            self.refused[number] = BARRED
            return number, None, BARRED.message
        outcome: Jpeg | Refusal | None = None
        while outcome is None:
            errand, outcome = self.turns.take()
            outcome = outcome or self._served(errand)
        self._count(outcome)
        if isinstance(outcome, Refusal):
            self.refused[errand.number] = outcome
            return errand.number, None, outcome.message
        return errand.number, Stream(outcome), None

    @property
    def over(self) -> bool:
        """True if nothing more need be fetched: the network is down, or something broke."""
        return self.defect is not None or (self.done >= self.storing.patience and self.is_down)

    @property
    def is_down(self) -> bool:
        """True if so few of the URLs so far had any answer that the fault is not theirs."""
        answered = self.done - self.silent
        return self.done >= MIN_JUDGED_URLS and answered < self.storing.min_success * self.done

    def _served(self, errand: Errand) -> Jpeg | Refusal | None:
        try:
            if errand.redirects and self.storing.blocklist.blocks_url(errand.url):
                self.turns.done(errand)
                return BARRED
            body = self.fetcher.serve(errand, self.turns)
            return self._checked(errand.number, body) if isinstance(body, bytes) else body
        except Exception as error:  # noqa: BLE001
            # Kept, and raised when the shard is over: an exception in this thread would leave Downloader's
            # pool waiting for ever (its feeder holds a semaphore that only the broken loop releases).
            self.defect = error
            return GIVEN_UP

    def _checked(self, number: int, body: bytes) -> Jpeg | Refusal:
        self.sent[number] = hashlib.sha256(body).hexdigest()
        if self.storing.blocklist.blocks_content(body):
            return Refusal(Reason.BLOCKED, "its content is on the blocklist")
        return _PICTURES.submit(self._jpeg, number, body).result()

    def _jpeg(self, number: int, body: bytes) -> Jpeg | Refusal:
        picture = prepared(body, self.storing.max_pixels, self.storing.edge)
        if not isinstance(picture, Picture):
            return picture
        self.phashes[number] = picture.phash
        if self.storing.blocklist.blocks_hashes(np.array([picture.phash])).any():
            return Refusal(Reason.BLOCKED, "its perceptual hash is on the blocklist")
        if min(picture.size) < self.storing.min_edge:
            return Refusal(Reason.TOO_SMALL, f"shorter edge below {self.storing.min_edge} pixels")
        return stored(picture, self.storing.edge, self.storing.jpeg_quality)

    def _count(self, outcome: Jpeg | Refusal) -> None:
        with self.lock:
            self.done += 1
            self.silent += isinstance(outcome, Refusal) and outcome.reason in SILENT
            if self.over:
                self.turns.give_up()
