"""The error of a URL that gives no image, with the reason word that its status row stores."""

from retrieval.storage.schema import Reason


class FetchError(Exception):
    """Why a URL gives no image. reason: word of the status table; the text is the message of that row.

    The text depends on the URL and the server's answer alone, so that equal answers give equal files. retry_after_s:
    seconds until another request may succeed; None: none can. is_busy: 429 or 503, so the pause is for the whole host.
    """

    def __init__(self, reason: Reason, message: str, retry_after_s: float | None = None, is_busy: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.is_busy = is_busy
