"""The most recent samples as PNG files in memory; the page loads them by URL."""

import hashlib
from collections import OrderedDict

MAX_PICTURES = 128


class PngCache:
    """PNG files by key; the oldest are dropped first."""

    def __init__(self) -> None:
        self._pngs: OrderedDict[str, bytes] = OrderedDict()

    def add(self, png: bytes) -> str:
        """Store a picture. Returns its URL, relative to that of the page."""
        key = hashlib.sha256(png).hexdigest()[:16]
        self._pngs[key] = png
        self._pngs.move_to_end(key)
        while len(self._pngs) > MAX_PICTURES:
            self._pngs.popitem(last=False)
        return f"made/{key}.png"

    def get(self, key: str) -> bytes | None:
        """The file, or None if it was dropped."""
        return self._pngs.get(key)
