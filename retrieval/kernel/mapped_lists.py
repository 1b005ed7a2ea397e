"""Inverted lists that stay in `index.faiss`: their codes are memory-mapped, and only ids and the rest are copied.

So a process holds the codes that its searches read, in pages that belong to the page cache: processes share them, and
the system can reclaim them. faiss itself copies all codes to the memory of each process.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np
import numpy.typing as npt

from retrieval.kernel.layout import BLOCK_ROWS, ListPointers

SIZES = struct.Struct("<4s4Q")
"""Start of the lists in the file: mark, number of lists, code size, rows a block, bytes a block."""
MARK, NO_CODE_SIZE = b"ilbl", (1 << 64) - 1
"""Of faiss.BlockInvertedLists. Their codes have no size of their own."""
COUNT = struct.Struct("<Q")


@dataclass(frozen=True)
class MappedIndex:
    """An index without the entries of its lists, and where the entries are."""

    index: Any
    """faiss.IndexIVFPQFastScan; its lists are empty."""
    pointers: ListPointers


def map_index(path: Path, num_lists: int) -> MappedIndex | None:
    """The index in a file, or None if its lists are no faiss.BlockInvertedLists with 32 rows a block.

    num_lists: how many it has. Raises ValueError unless all lists are complete in the file and at the first mark of
    lists, and RuntimeError where faiss cannot read the rest.
    """
    mark = SIZES.pack(MARK, num_lists, NO_CODE_SIZE, BLOCK_ROWS, 0)[: -COUNT.size]
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            start, first = whole.find(mark), whole.find(MARK)
            end = start + SIZES.size
            head = whole[:end]
        if start < 0:
            return None
        if first < start:  # faiss could read those. All numbers before our lists are too small to contain a mark.
            raise ValueError(f"it has lists at byte {first:,}, expected the first at byte {start:,}")
        index = faiss.deserialize_index(np.frombuffer(head + bytes(2 * COUNT.size * num_lists), np.uint8))
        mapped = np.memmap(file, np.uint8, "r")
        file.seek(end)  # the lists are read, because pages of a map would stay resident
        entries = [_read_list(file, len(mapped), SIZES.unpack(head[-SIZES.size :])[-1]) for _ in range(num_lists)]
        if file.tell() != len(mapped):
            raise ValueError(f"its lists end at byte {file.tell():,}, expected {len(mapped):,}")
    return MappedIndex(index, _pointers(mapped, entries))


def _read_list(file: BinaryIO, file_bytes: int, block_bytes: int) -> tuple[bytes, int]:
    """The ids of the list at the present place of a file, and the place of its codes. Moves behind them."""
    count = _read_count(file, file_bytes // COUNT.size)
    ids = file.read(COUNT.size * count)
    code_bytes, start = _read_count(file, file_bytes), file.tell()
    if code_bytes != -(-count // BLOCK_ROWS) * block_bytes or file.seek(start + code_bytes) > file_bytes:
        raise ValueError(f"a list of {count:,} rows has {code_bytes:,} bytes of codes at byte {start:,}")
    return ids, start


def _read_count(file: BinaryIO, most: int) -> int:
    number = file.read(COUNT.size)
    if len(number) < COUNT.size or (count := COUNT.unpack(number)[0]) > most:
        raise ValueError(f"a list at byte {file.tell():,} goes beyond the end of the file")
    return int(count)


def _pointers(mapped: npt.NDArray[np.uint8], entries: list[tuple[bytes, int]]) -> ListPointers:
    ids = np.frombuffer(b"".join(ids for ids, _ in entries), np.int64)
    sizes = np.array([len(ids) // COUNT.size for ids, _ in entries], np.int64)
    first = (COUNT.size * (np.cumsum(sizes) - sizes)).astype(np.uint64)
    starts = np.array([start for _, start in entries], np.uint64)
    return ListPointers(
        codes=np.uint64(mapped.ctypes.data) + starts,
        ids=np.uint64(ids.ctypes.data) + first,
        sizes=sizes,
        memory=(mapped, ids),
    )
