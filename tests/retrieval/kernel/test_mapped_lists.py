"""The codes of inverted lists stay in their file, and a file whose lists do not fit is refused."""

import ctypes
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.compute as pc
import pytest

from retrieval import Database, Effort, Root, UserError
from retrieval.file_cache import FileCache
from retrieval.index.inverted_lists import train_inverted_lists
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors
from retrieval.kernel.layout import ListPointers, list_pointers
from retrieval.kernel.mapped_lists import SIZES, list_entries, map_index
from tests.retrieval.conftest import clustered

pytestmark = pytest.mark.usefixtures("compiled_library")


@pytest.fixture(scope="module")
def index() -> Any:
    """An index of 600 rows."""
    return train_inverted_lists(clustered(600, seed=1).astype(np.float16), 0).index


@pytest.fixture
def path(index: Any, tmp_path: Path) -> Path:
    """The file of the index."""
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    return tmp_path / "index.faiss"


def entries(pointers: ListPointers, block_bytes: int) -> list[tuple[bytes, bytes]]:
    """The ids and the codes of each list."""
    sizes = pointers.sizes.tolist()
    columns = zip(sizes, pointers.ids.tolist(), pointers.codes.tolist(), strict=True)
    return [
        (ctypes.string_at(ids, 8 * size), ctypes.string_at(codes, -(-size // 32) * block_bytes)) if size else (b"", b"")
        for size, ids, codes in columns
    ]


def mapping_of(address: int) -> list[str]:
    """The lines of /proc/self/smaps on the mapping at an address."""
    lines: list[str] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if lines:
                break
            if not start <= address < end:
                continue
            lines.append(line)
        elif lines:
            lines.append(line)
    return lines


def test_mapped_lists_are_those_that_faiss_reads(index: Any, path: Path) -> None:
    mapped = map_index(path, index.nlist, list_entries(index))
    assert mapped is not None
    block_bytes = index.M2 * 16
    assert entries(mapped.pointers, block_bytes) == entries(list_pointers(index), block_bytes)
    assert mapped.index.invlists.compute_ntotal() == 0
    queries = clustered(9, seed=2)
    for found, expected in zip(mapped.index.quantizer.search(queries, 5), index.quantizer.search(queries, 5)):
        np.testing.assert_array_equal(found, expected)


def test_a_search_maps_the_codes_and_single_rows_and_copies_neither(in_lists: Database, queries: Vectors) -> None:
    database = Database.open(in_lists.root)
    for view in (database, database.where(pc.field("image_id") < 2500), database.without([1000])):
        view.search(queries, 5)
    files = database.partitions[0].files
    pointers = files._mapped_index.pointers  # type: ignore[union-attr]
    filled = pointers.sizes > 0
    assert all(mapping_of(address)[0].endswith("/index.faiss") for address in pointers.codes[filled][::100].tolist())
    rows = mapping_of(files.list_search._kept[1]["rows"].ctypes.data)  # type: ignore[union-attr]
    assert rows[0].endswith("/embeddings.npy")
    assert "rr" in rows[-1].split(), "the system reads other rows in advance"
    assert "_base" not in vars(files), "faiss read all codes"


def cut(content: bytes, start: int) -> bytes:
    return content[:-1]


def longer(content: bytes, start: int) -> bytes:
    return content + bytes(8)


def set_number(place: int, value: int) -> Callable[[bytes, int], bytes]:
    """Sets a number of 64 bits, so many bytes behind the start of the lists."""

    def change(content: bytes, start: int) -> bytes:
        return content[: start + place] + struct.pack("<Q", value) + content[start + place + 8 :]

    return change


def with_decoy(content: bytes, start: int) -> bytes:
    """Empty lists with the right sizes, which faiss reads, before a list of 64 rows whose blocks have no bytes."""
    mark, count, no_code_size, block_rows, block_bytes = SIZES.unpack_from(content, start)
    decoy = SIZES.pack(mark, count, block_bytes // block_rows, block_rows, block_bytes) + bytes(16 * count)
    lists = SIZES.pack(mark, count, no_code_size, block_rows, 0) + bytes(16 * (count - 1))
    changed = content[:start] + decoy + lists + struct.pack("<Q", 64) + bytes(8 * 64) + bytes(8)
    assert faiss.deserialize_index(np.frombuffer(changed, np.uint8)).invlists.compute_ntotal() == 0
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "its lists end at byte"),
        (longer, "its lists end at byte"),
        (set_number(SIZES.size - 8, 512), "its lists end at byte"),
        (set_number(SIZES.size - 8, (1 << 64) - 8), "its lists end at byte"),
        (with_decoy, "it has lists at byte .*, expected the first at byte"),
    ],
)
def test_lists_that_do_not_fit_their_file_are_refused(
    index: Any, path: Path, change: Callable[[bytes, int], bytes], message: str
) -> None:
    content = path.read_bytes()
    path.write_bytes(change(content, content.index(b"ilbl")))
    with pytest.raises(ValueError, match=message):
        map_index(path, index.nlist, list_entries(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries, lists: entries[:lists], "no entries of .* lists"),
        (lambda entries, lists: entries[:-1], "no entries of .* lists"),
        (lambda entries, lists: np.append(entries, 0), "no entries of .* lists"),
        (lambda entries, lists: np.insert(entries[1:], 0, -1), "no entries of .* lists"),
        (lambda entries, lists: np.insert(entries[1:], 1, 1 << 40), "no entries of .* lists"),
        (lambda entries, lists: np.append(entries[:-1], -1), r"ids are not in \[0, 3,000\)"),
        (lambda entries, lists: np.append(entries[:-1], 3000), r"ids are not in \[0, 3,000\)"),
    ],
)
def test_damage_of_the_entries_names_their_file(
    in_lists: Database, queries: Vectors, tmp_path: Path, change: Callable[[Any, int], Any], message: str
) -> None:
    root = Root(shutil.copytree(in_lists.root.local_path(""), tmp_path / "copy"))
    path = root.local_path("partitions/00000/entries.npy")
    np.save(path, change(np.load(path), in_lists.partitions[0].num_lists))
    partition = Partition.open(FileCache(root), "partitions/00000", in_lists.dim, np.empty(0, np.int64))
    with pytest.raises(UserError, match=rf"entries\.npy cannot be read \(.*{message}.*the database is damaged"):
        partition.search(queries, 9, Effort(1, 2, 4))


def test_entries_of_other_sizes_than_the_lists_are_refused(index: Any, path: Path) -> None:
    entries = list_entries(index)
    entries[: index.nlist] = 0  # all rows in the last list
    with pytest.raises(ValueError, match=r"by their sizes in entries\.npy, expected .*; laion-rdm verify states which"):
        map_index(path, index.nlist, entries)


def test_a_partition_without_entries_is_searched_in_memory(
    in_lists: Database, queries: Vectors, tmp_path: Path
) -> None:
    root = Root(shutil.copytree(in_lists.root.local_path(""), tmp_path / "copy"))
    root.delete("partitions/00000/entries.npy")
    partition = Partition.open(FileCache(root), "partitions/00000", in_lists.dim, np.empty(0, np.int64))
    effort = Effort(1, 2, 4)
    for found, expected in zip(partition.search(queries, 9, effort), in_lists.partitions[0].search(queries, 9, effort)):
        np.testing.assert_array_equal(found, expected)
    assert partition.files._mapped_index is None


def test_lists_of_another_kind_or_number_are_not_mapped(index: Any, path: Path, tmp_path: Path) -> None:
    entries = list_entries(index)
    assert map_index(path, index.nlist - 1, entries) is None
    other = faiss.index_factory(32, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    other.train(clustered(200, seed=1))
    faiss.write_index(other, str(tmp_path / "other.faiss"))
    assert map_index(tmp_path / "other.faiss", 4, entries) is None
