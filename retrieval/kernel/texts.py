"""Hashes many texts and finds clean URLs among them, by the compiled library.

Without it `hashlib` takes four times as long for a hash, and `pipeline.web.urls` matches a pattern instead.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.kernel.library import library

DIGEST_BYTES = 32
ROWS_AT_ONCE = 1 << 12
"""Texts that are Python objects at a time: few enough that the allocator reuses their memory."""

Digests = npt.NDArray[np.uint8]


def sha256_digests(texts: pa.Array) -> Digests:
    """The SHA-256 of texts without nulls, (n, 32)."""
    raw, loaded = texts.cast(pa.binary()), library()
    assert not raw.null_count
    if loaded is None:
        return _by_hashlib(raw)
    digests = np.empty((len(raw), DIGEST_BYTES), np.uint8)
    if len(raw):
        loaded.hash_texts(*_addresses(raw), len(raw), digests.ctypes.data)
    return digests


def find_clean_urls(texts: pa.Array, max_bytes: int) -> npt.NDArray[np.bool_] | None:
    """Which texts are URLs in the common notation of clean_urls.h, (n,); nulls are not. None without the library.

    The notation is a part of `pipeline.web.urls._CLEAN`.
    """
    raw, loaded = texts.cast(pa.binary()), library()
    if loaded is None:
        return None
    are_clean = np.zeros(len(raw), np.bool_)
    if len(raw):
        loaded.find_clean_urls(*_addresses(raw), len(raw), max_bytes, are_clean.ctypes.data)
    return are_clean & raw.is_valid().to_numpy(zero_copy_only=False) if raw.null_count else are_clean


def _addresses(raw: pa.BinaryArray) -> tuple[int | None, int]:
    """The addresses of the bytes and of the first offset of an array with rows."""
    _, offsets, data = raw.buffers()
    return data.address if data else None, offsets.address + raw.offset * np.dtype(np.int32).itemsize


def _by_hashlib(raw: pa.BinaryArray) -> Digests:
    empty, digests = hashlib.sha256(), bytearray()
    for first in range(0, len(raw), ROWS_AT_ONCE):
        for text in raw.slice(first, ROWS_AT_ONCE).to_pylist():
            digest = empty.copy()  # 10 % faster than a new object, for which OpenSSL looks up the algorithm
            digest.update(text)
            digests += digest.digest()
    return np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)
