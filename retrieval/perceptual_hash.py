"""The look of a picture in 64 bits, of which a copy that was scaled or encoded again changes few.

Takes decoded pictures and hashes; reads and writes nothing. A bit is the sign of one of the 8 x 8 lowest
waves of the gray picture at 32 x 32 (the DCT block of Zauner's pHash, which cuts at the median instead):
a mirror changes the sign of known waves, so mirrored copies are found by a constant. Cropped ones are not.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

NONE = 0
"""The hash of a picture that shows next to nothing; it is near no other."""
MAX_BITS = 7
"""Of two hashes that differ in at most so many bits, one of four 16-bit bands differs in at most one."""
MIRRORED = np.uint64(0xAAAAAAAAAAAAAAAA)
EDGE = 32
WAVES = 8
FLAT = 32.0
"""A picture (32 x 32, 0 .. 255) whose largest wave is less shows what an encoder's rounding may have made."""
BANDS = 4
PAIRS_AT_ONCE = 1 << 17

Hashes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_COSINES = np.cos(np.pi / EDGE * np.outer(np.arange(1, WAVES + 1), np.arange(EDGE) + 0.5)).astype(np.float32)
_FLIPS = np.array([0, *(1 << bit for bit in range(16))])
_HALVES = tuple(np.uint64(int(byte * 8, 16)) for byte in ("55", "33", "0F", "01"))


def phash(image: Image.Image) -> int:
    """The hash of a decoded picture, as an int64."""
    gray = np.asarray(image.convert("L").resize((EDGE, EDGE), Image.Resampling.BOX), np.float32)
    waves = _COSINES @ gray @ _COSINES.T
    if np.abs(waves).max() < FLAT:
        return NONE
    return int(np.packbits(waves.ravel() > 0).view(">u8").astype(np.int64)[0])


def bits_apart(some: npt.NDArray[np.uint64], others: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """In how many bits each of some hashes (n,) differs from each of the others (m,); (n, m)."""
    differ = some[:, None] ^ others
    pairs, nibbles, bytes_, sums = _HALVES
    differ -= differ >> np.uint64(1) & pairs
    differ = (differ & nibbles) + (differ >> np.uint64(2) & nibbles)
    differ = differ + (differ >> np.uint64(4)) & bytes_
    return differ * sums >> np.uint64(56)


class Looks:
    """Hashes among which near ones can be found: held four times, in the order of each 16-bit band."""

    def __init__(self, hashes: Hashes) -> None:
        self._bands = [_by_key(hashes[hashes != NONE].view(np.uint64), band) for band in range(BANDS)]

    def have(self, hashes: Hashes, bits: int) -> Mask:
        """Which of the hashes (n,) differ from one of these, or from its mirror, in at most `bits` bits.

        The more are asked for at once, the less each costs.
        """
        assert 0 <= bits <= MAX_BITS
        found = np.zeros(len(hashes), bool)
        for turned in (np.uint64(0), MIRRORED):
            asked = np.flatnonzero(~found & (hashes != NONE))
            found[asked] = self._near(hashes[asked].view(np.uint64) ^ turned, bits)
        return found

    def _near(self, queries: npt.NDArray[np.uint64], bits: int) -> Mask:
        found = np.zeros(len(queries), bool)
        flips = _FLIPS if bits >= BANDS else _FLIPS[:1]
        for band, (_, mine, starts) in enumerate(self._bands):
            asking, theirs, firsts = _by_key(queries, band)
            for key in np.flatnonzero(np.diff(firsts)):
                rows = np.concatenate([mine[starts[near] : starts[near + 1]] for near in key ^ flips])
                if len(rows):
                    here = slice(firsts[key], firsts[key + 1])
                    found[asking[here]] |= _within(theirs[here], rows, bits)
        return found


def _by_key(
    hashes: npt.NDArray[np.uint64], band: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Rows in the order of 16 of their bits, the hashes in this order, and where each key begins in it."""
    keys = (hashes >> np.uint64(16 * band) & np.uint64(0xFFFF)).astype(np.int64)
    order = np.argsort(keys, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=1 << 16))])
    return order, hashes[order], starts


def _within(queries: npt.NDArray[np.uint64], rows: npt.NDArray[np.uint64], bits: int) -> Mask:
    """Which of the queries are within so many bits of a row. bits: fewer than 256."""
    step = max(1, PAIRS_AT_ONCE // len(rows))
    parts = [queries[first : first + step] for first in range(0, len(queries), step)]
    return np.concatenate([(bits_apart(part, rows) <= bits).any(axis=1) for part in parts])
