"""A 64-bit perceptual hash of a picture. A scaled or recompressed copy differs in a few bits.

Each bit is the sign of one of the 8 x 8 lowest DCT coefficients of the gray picture at 32 x 32 pixels (Zauner's
pHash compares with the median instead). Mirroring flips the sign of the odd horizontal frequencies, so one XOR
finds mirrored copies. Cropped copies are not found.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

BLANK_HASH = 0
"""Hash of a nearly uniform picture, and the value for "no hash". It matches no other hash."""
MAX_DISTANCE = 7
"""Largest searchable distance: hashes with at most 7 different bits share one of four bands up to a single bit."""
MIRROR_MASK = np.uint64(0xAAAAAAAAAAAAAAAA)
"""XOR with this gives the hash of the mirrored picture."""
EDGE = 32
FREQUENCIES = 8
MIN_AMPLITUDE = 32.0
"""A picture (32 x 32, values 0 to 255) without a larger DCT coefficient is blank up to compression noise."""
BANDS = 4
PAIRS_AT_ONCE = 1 << 17

Hashes = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

_COSINES = np.cos(np.pi / EDGE * np.outer(np.arange(1, FREQUENCIES + 1), np.arange(EDGE) + 0.5)).astype(np.float32)
_SINGLE_BIT_FLIPS = np.array([0, *(1 << bit for bit in range(16))])
_HALVES = tuple(np.uint64(int(byte * 8, 16)) for byte in ("55", "33", "0F", "01"))


def perceptual_hash(image: Image.Image) -> int:
    """The perceptual hash of a decoded picture, as an int64."""
    gray = np.asarray(image.convert("L").resize((EDGE, EDGE), Image.Resampling.BOX), np.float32)
    coefficients = _COSINES @ gray @ _COSINES.T
    if np.abs(coefficients).max() < MIN_AMPLITUDE:
        return BLANK_HASH
    return int(np.packbits(coefficients.ravel() > 0).view(">u8").astype(np.int64)[0])


def hamming_distance(hashes: Bits, others: Bits) -> Bits:
    """Number of different bits of each pair of hashes. hashes: (n,); others: (m,). Returns (n, m).

    >>> hamming_distance(np.array([0b1011], np.uint64), np.array([0b1011, 0b0010], np.uint64)).tolist()
    [[0, 2]]
    """
    differences = hashes[:, None] ^ others
    pairs, nibbles, bytes_, sums = _HALVES
    differences -= differences >> np.uint64(1) & pairs
    differences = (differences & nibbles) + (differences >> np.uint64(2) & nibbles)
    differences = differences + (differences >> np.uint64(4)) & bytes_
    return differences * sums >> np.uint64(56)


class PerceptualHashIndex:
    """A set of hashes, searched by distance. Holds four copies, each sorted by one 16-bit band."""

    def __init__(self, hashes: Hashes) -> None:
        self._bands = [_sorted_by_band(hashes[hashes != BLANK_HASH].view(np.uint64), b) for b in range(BANDS)]

    def contains_near(self, hashes: Hashes, max_distance: int) -> Mask:
        """Which hashes, mirrored or not, are within `max_distance` bits of a hash of the index.

        hashes: (n,); returns (n,). Large batches cost less per hash.
        """
        assert 0 <= max_distance <= MAX_DISTANCE
        matches = np.zeros(len(hashes), bool)
        for mask in (np.uint64(0), MIRROR_MASK):
            rows = np.flatnonzero(~matches & (hashes != BLANK_HASH))
            matches[rows] = self._near(hashes[rows].view(np.uint64) ^ mask, max_distance)
        return matches

    def _near(self, queries: Bits, max_distance: int) -> Mask:
        matches = np.zeros(len(queries), bool)
        # Fewer than 4 different bits leave one of the 4 bands equal.
        flips = _SINGLE_BIT_FLIPS if max_distance >= BANDS else _SINGLE_BIT_FLIPS[:1]
        for band, (_, indexed, starts) in enumerate(self._bands):
            order, ordered, firsts = _sorted_by_band(queries, band)
            for key in np.flatnonzero(np.diff(firsts)):
                candidates = np.concatenate([indexed[starts[near] : starts[near + 1]] for near in key ^ flips])
                if len(candidates):
                    rows = slice(firsts[key], firsts[key + 1])
                    matches[order[rows]] |= _within(ordered[rows], candidates, max_distance)
        return matches


def _sorted_by_band(hashes: Bits, band: int) -> tuple[npt.NDArray[np.int64], Bits, npt.NDArray[np.int64]]:
    """Hashes (n,) sorted by one 16-bit band: their order, the sorted hashes, and the start of each key."""
    keys = (hashes >> np.uint64(16 * band) & np.uint64(0xFFFF)).astype(np.int64)
    order = np.argsort(keys, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(keys, minlength=1 << 16))])
    return order, hashes[order], starts


def _within(queries: Bits, candidates: Bits, max_distance: int) -> Mask:
    """Which queries are within `max_distance` bits of any candidate. Compares in blocks to bound memory."""
    step = max(1, PAIRS_AT_ONCE // len(candidates))
    blocks = [queries[first : first + step] for first in range(0, len(queries), step)]
    return np.concatenate([(hamming_distance(b, candidates) <= max_distance).any(axis=1) for b in blocks])
