"""Where our own fetching takes the place of img2dataset's.

img2dataset's `Downloader` calls a function of its module, `download_image_with_retry(row, ...)`, in many
threads, and gives what it returns to its resizer and writer. That function opens file:// URLs and private
addresses, has no limit of bytes or time, retries whatever fails, and leaves rotated and 16-bit pictures to
be decoded wrongly. `shard_download` puts a `Seam` in its place while one shard is made.
"""

import hashlib
import io
import threading
from dataclasses import dataclass, field

from pipeline.fetch import Fetcher
from pipeline.picture import Picture, prepared
from pipeline.sockets import Refusal
from retrieval.schema import Reason

SILENT = frozenset({Reason.NO_CONNECTION, Reason.TIMEOUT})
MIN_JUDGED_URLS = 5
_GIVEN_UP = Refusal(Reason.NO_CONNECTION, "not tried: the shard was given up")


class Stream(io.BytesIO):
    """A picture on its way to the resizer."""

    def __init__(self, picture: Picture) -> None:
        super().__init__(picture.data)
        self.picture = picture


@dataclass
class Seam:
    """Fetches the URLs of one shard; knows of each what came, by its row. sent: SHA-256 of bodies, in hex."""

    fetcher: Fetcher
    max_pixels: int
    max_edge: int
    min_success: float
    patience: int
    """URLs that may pass without an answer before the rest is not tried."""
    sent: dict[int, str] = field(default_factory=dict)
    refused: dict[int, Refusal] = field(default_factory=dict)
    defect: Exception | None = None
    done: int = 0
    silent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, row: tuple[int, str], **_settings: object) -> tuple[int, Stream | None, str | None]:
        """What `download_image_with_retry` gives: the row's number, and a picture or a message."""
        number, url = row
        try:
            outcome = _GIVEN_UP if self.over else self._picture(number, url)
        except Exception as error:  # noqa: BLE001
            # Kept, and raised when the shard is over: an exception in this thread would leave Downloader's
            # pool waiting for ever (its feeder holds a semaphore that only the broken loop releases).
            self.defect = error
            outcome = _GIVEN_UP
        self._count(outcome)
        if isinstance(outcome, Refusal):
            self.refused[number] = outcome
            return number, None, outcome.message
        return number, Stream(outcome), None

    @property
    def over(self) -> bool:
        """True if nothing more need be fetched: the network is down, or something broke."""
        return self.defect is not None or (self.done >= self.patience and self.is_down)

    @property
    def is_down(self) -> bool:
        """True if so few of the URLs so far had any answer that the fault is not theirs."""
        answered = self.done - self.silent
        return self.done >= MIN_JUDGED_URLS and answered < self.min_success * self.done

    def _picture(self, number: int, url: str) -> Picture | Refusal:
        body = self.fetcher.fetch(url)
        if isinstance(body, Refusal):
            return body
        self.sent[number] = hashlib.sha256(body).hexdigest()
        return prepared(body, self.max_pixels, self.max_edge)

    def _count(self, outcome: Picture | Refusal) -> None:
        with self.lock:
            self.done += 1
            self.silent += isinstance(outcome, Refusal) and outcome.reason in SILENT
