"""Inverted lists that stay in `index.faiss`: their codes are memory-mapped. Their ids are read from `entries.npy`.

So a process holds the codes that its searches read, in pages that belong to the page cache: processes share them, and
the system can reclaim them. faiss itself copies all codes to the memory of each process. `index.faiss` has the ids
between the codes, so the system would read most codes with them: 420 MB of a million rows, in place of 31 MB.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.kernel.layout import BLOCK_ROWS, ListPointers, ids_of, list_pointers

SIZES = struct.Struct("<4s4Q")
"""Start of the lists in the file: mark, number of lists, code size, rows a block, bytes a block."""
MARK, NO_CODE_SIZE = b"ilbl", (1 << 64) - 1
"""Of faiss.BlockInvertedLists. Their codes have no size of their own."""
NUMBER_BYTES = 8
"""Of an id, and of the numbers of rows and of bytes of codes, which are before the ids and before the codes."""

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MappedIndex:
    """An index without the entries of its lists, and where the entries are."""

    index: Any
    """faiss.IndexIVFPQFastScan; its lists are empty."""
    pointers: ListPointers


def list_entries(index: Any) -> Numbers:
    """The content of `entries.npy`: the offsets of the lists of an index, (lists + 1,), and the ids of their rows."""
    pointers = list_pointers(index)
    return np.concatenate([[0], np.cumsum(pointers.sizes), ids_of(pointers)])


def check_entries(entries: Numbers, num_lists: int, rows: int) -> Numbers:
    """Returns numbers (n,). Raises ValueError unless they can be `list_entries` of so many lists and rows."""
    offsets, ids = entries[: num_lists + 1], entries[num_lists + 1 :]
    if len(offsets) <= num_lists or offsets[0] or (np.diff(offsets) < 0).any() or offsets[-1] != len(ids):
        raise ValueError(f"its {len(entries):,} numbers are no entries of {num_lists:,} lists")
    if ((ids < 0) | (ids >= rows)).any():
        raise ValueError(f"its ids are not in [0, {rows:,})")
    return entries


def map_index(path: Path, num_lists: int, entries: Numbers) -> MappedIndex | None:
    """The index in a file, or None if its lists are no faiss.BlockInvertedLists with 32 rows a block.

    num_lists: how many it has. entries: as `check_entries` returns them. Raises ValueError unless lists of these sizes
    begin at the first mark of lists and end with the file, and RuntimeError where faiss cannot read the rest.
    """
    mark = SIZES.pack(MARK, num_lists, NO_CODE_SIZE, BLOCK_ROWS, 0)[:-NUMBER_BYTES]
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            start, first = whole.find(mark), whole.find(MARK)
            end = start + SIZES.size
            head = whole[:end]
        if start < 0:
            return None
        if first < start:  # faiss could read those. All numbers before our lists are too small to contain a mark.
            raise ValueError(f"it has lists at byte {first:,}, expected the first at byte {start:,}")
        index = faiss.deserialize_index(np.frombuffer(head + bytes(2 * NUMBER_BYTES * num_lists), np.uint8))
        mapped = np.memmap(file, np.uint8, "r")
    offsets, ids = entries[: num_lists + 1], entries[num_lists + 1 :]
    pointers = _pointers(mapped, end, ids, np.diff(offsets), SIZES.unpack(head[-SIZES.size :])[-1])
    return MappedIndex(index, pointers)


def _pointers(
    mapped: npt.NDArray[np.uint8], start: int, ids: Numbers, sizes: Numbers, block_bytes: int
) -> ListPointers:
    """The entries of lists that begin at a byte of a mapped file. Raises ValueError unless they end with it."""
    blocks = -(-sizes // BLOCK_ROWS)
    end = start + NUMBER_BYTES * (2 * len(sizes) + len(ids)) + int(blocks.sum()) * block_bytes
    if end != len(mapped) or block_bytes > len(mapped):
        found = f"its lists end at byte {end:,} by their sizes in entries.npy, expected {len(mapped):,}"
        raise ValueError(f"{found}; laion-rdm verify states which of the two files is damaged")
    before_codes = NUMBER_BYTES * (2 + sizes)
    list_bytes = before_codes + blocks * block_bytes
    codes = start + np.cumsum(list_bytes) - list_bytes + before_codes
    first_ids = NUMBER_BYTES * (np.cumsum(sizes) - sizes)
    return ListPointers(
        codes=np.uint64(mapped.ctypes.data) + codes.astype(np.uint64),
        ids=np.uint64(ids.ctypes.data) + first_ids.astype(np.uint64),
        sizes=sizes,
        memory=(mapped, ids),
    )
