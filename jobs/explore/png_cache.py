"""The pictures that were made last, as PNG files in memory, which pages still show."""

import hashlib
from collections import OrderedDict

KEPT = 128


class Made:
    """PNG files by a key."""

    def __init__(self) -> None:
        self._pngs: OrderedDict[str, bytes] = OrderedDict()

    def keep(self, png: bytes) -> str:
        """Remember a picture; returns where it can be fetched."""
        key = hashlib.sha256(png).hexdigest()[:16]
        self._pngs[key] = png
        self._pngs.move_to_end(key)
        while len(self._pngs) > KEPT:
            self._pngs.popitem(last=False)
        return f"/made/{key}.png"

    def png(self, key: str) -> bytes | None:
        """The file, or None where it is forgotten."""
        return self._pngs.get(key)
