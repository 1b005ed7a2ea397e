"""An index that does not fit its rows is refused, because the library reads memory by the numbers in the index."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from retrieval import Root, UserError
from retrieval.file_cache import FileCache
from retrieval.index.inverted_lists import train_inverted_lists
from retrieval.index.partition_files import PartitionFiles
from retrieval.index.rerank import CodedRows
from retrieval.kernel.layout import (
    MAX_LIST_ROWS,
    ListPointers,
    check_ids,
    checked_pointers,
    is_searchable,
    list_pointers,
)
from retrieval.kernel.list_search import open_list_search
from tests.retrieval.conftest import DIM, clustered

Rows = np.ndarray
Built = tuple[Any, Rows]


@pytest.fixture(scope="module")
def built() -> Built:
    """An index and its 600 float16 rows."""
    rows = clustered(600, seed=1).astype(np.float16)
    lists = train_inverted_lists(rows, 0)
    return lists.index, rows[lists.order]


def opened(index: Any, rows: Rows, folder: Path) -> PartitionFiles:
    """The files of a partition with an index and rows."""
    (folder / "partition").mkdir()
    faiss.write_index(index, str(folder / "partition" / "index.faiss"))
    np.save(folder / "partition" / "embeddings.npy", rows)
    np.save(folder / "partition" / "lists.npy", np.zeros(index.nlist + 1, np.int64))
    return PartitionFiles(FileCache(Root(folder)), "partition", rows.shape[1])


def graph_of(index: Any) -> Any:
    return faiss.downcast_index(index.quantizer).hnsw


def storage_of(index: Any) -> Any:
    return faiss.downcast_index(faiss.downcast_index(index.quantizer).storage)


def set_id(index: Any, value: int) -> None:
    number = next(number for number in range(index.nlist) if index.invlists.list_size(number))
    faiss.rev_swig_ptr(index.invlists.get_ids(number), 1)[0] = value


def set_link(index: Any, place: int, value: int) -> None:
    links = graph_of(index).neighbors
    faiss.rev_swig_ptr(links.data(), links.size())[place] = value


def link_to_a_lower_level(index: Any) -> None:
    graph = graph_of(index)
    levels, offsets = faiss.vector_to_array(graph.levels), faiss.vector_to_array(graph.offsets)
    place = offsets[np.argmax(levels > 1)] + graph.cum_nneighbor_per_level.at(1)
    set_link(index, int(place), int(np.argmin(levels)))


def set_level(index: Any, value: int) -> None:
    levels = faiss.vector_to_array(graph_of(index).levels)
    levels[0] = value
    faiss.copy_array_to_vector(levels, graph_of(index).levels)


def set_centroid(index: Any, bits: int) -> None:
    codes = storage_of(index).codes
    faiss.rev_swig_ptr(codes.data(), codes.size()).view(np.uint16)[7] = bits


def set_entry(index: Any, value: int) -> None:
    graph_of(index).entry_point = value


def set_top_level(index: Any, value: int) -> None:
    graph_of(index).max_level = value


def set_rows(index: Any, value: int) -> None:
    index.ntotal = value


def set_codes(index: Any, value: int) -> None:
    index.M2 = value


def set_block_rows(index: Any, value: int) -> None:
    faiss.downcast_InvertedLists(index.invlists).n_per_block = value


def set_block_bytes(index: Any, value: int) -> None:
    faiss.downcast_InvertedLists(index.invlists).block_size = value


def cut_centroids(index: Any) -> None:
    storage_of(index).codes.resize(storage_of(index).codes.size() - 2)


def set_centroids(index: Any, value: int) -> None:
    faiss.downcast_index(index.quantizer).ntotal = value


def other_lists(index: Any) -> None:
    lists = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    lists.this.disown()
    index.replace_invlists(lists, True)


DAMAGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "id of a missing row": (lambda index: set_id(index, 600), r"ids of its lists are not in \[0, 600"),
    "negative id": (lambda index: set_id(index, -1), "ids of its lists"),
    "link to a missing list": (lambda index: set_link(index, 3, index.nlist), "links of its graph are not"),
    "negative link": (lambda index: set_link(index, 3, -2), "links of its graph are not"),
    "link to a lower level": (link_to_a_lower_level, "nodes of a lower level"),
    "level too high": (lambda index: set_level(index, 90), "levels of its graph are out of range"),
    "level too low": (lambda index: set_level(index, 0), "levels of its graph are out of range"),
    "other level": (lambda index: set_level(index, 3), "not where its levels say"),
    "no entry point": (lambda index: set_entry(index, -1), "entry point -1"),
    "missing entry point": (lambda index: set_entry(index, index.nlist), "entry point 256"),
    "top level": (lambda index: set_top_level(index, 7), "has no level 7"),
    "centroid not a number": (lambda index: set_centroid(index, 0x7FC0), "no unit vectors"),
    "infinite centroid": (lambda index: set_centroid(index, 0xFF80), "no unit vectors"),
    "long centroid": (lambda index: set_centroid(index, 0x7F00), "no unit vectors"),
    "rows": (lambda index: set_rows(index, 601), "rows: 601, expected 600"),
    "codes": (lambda index: set_codes(index, 64), "codes a row, with padding: 64, expected 16"),
    "rows a block": (lambda index: set_block_rows(index, 64), "rows a block: 64, expected 32"),
    "bytes a block": (lambda index: set_block_bytes(index, 128), "bytes a block: 128, expected 256"),
    "fewer centroids": (cut_centroids, "bytes of the centroids: 16,382, expected 16,384"),
    "centroids": (lambda index: set_centroids(index, 255), "nodes in the graph: 255, expected 256"),
    "other lists": (other_lists, "its lists are ArrayInvertedLists"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_index_is_refused(built: Built, tmp_path: Path, kind: str) -> None:
    (index, rows), (damage, message) = built, DAMAGES[kind]
    index = faiss.deserialize_index(faiss.serialize_index(index))
    assert is_searchable(index)
    checked_pointers(index, rows)
    damage(index)
    with pytest.raises(ValueError, match=message):
        checked_pointers(index, rows)
    files = opened(index, rows, tmp_path)
    with pytest.raises(UserError, match=r"index\.faiss cannot be read .*the database is damaged"):
        _ = files.list_search


def test_entries_of_another_number_of_lists_are_refused(built: Built) -> None:
    index, rows = built
    pointers = list_pointers(index)
    fewer = replace(pointers, codes=pointers.codes[:-1], ids=pointers.ids[:-1], sizes=pointers.sizes[:-1])
    with pytest.raises(ValueError, match="lists in the file: 255, expected 256"):
        checked_pointers(index, rows, fewer)


def test_an_index_of_other_rows_is_refused(built: Built, tmp_path: Path) -> None:
    index, rows = built
    for number, (others, message) in enumerate(
        (
            (rows[:-1], "rows: 600, expected 599"),
            (np.ascontiguousarray(rows[:, :-1]), f"dimensions: {DIM}, expected {DIM - 1}"),
            (np.repeat(rows, 2, axis=1), f"dimensions: {DIM}, expected {2 * DIM}"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=rf"index\.faiss cannot be read .*{message}.*the database is damaged"):
            _ = opened(index, others, folder).list_search


def test_an_index_over_8_bit_numbers_is_checked_and_left_to_faiss(built: Built) -> None:
    index, rows = built
    coded = CodedRows.encode(rows)
    assert open_list_search(index, coded) is None
    with pytest.raises(ValueError, match="rows: 600, expected 599"):
        open_list_search(index, CodedRows(coded.codes[:-1], coded.bounds))


def test_a_list_of_too_many_rows_is_refused() -> None:
    none = np.zeros(1, np.uint64)
    with pytest.raises(ValueError, match="a list has 268,435,456 rows"):
        check_ids(ListPointers(none, none, np.array([MAX_LIST_ROWS]), ()), 10)


def test_other_indexes_are_left_to_faiss() -> None:
    rows = clustered(2000, seed=1)
    for key in ("IVF16,Flat", "IVF16,PQ16x4fs", "HNSW8"):
        index = faiss.index_factory(rows.shape[1], key, faiss.METRIC_INNER_PRODUCT)
        index.train(rows)
        assert not is_searchable(index)
        assert open_list_search(index, rows.astype(np.float16)) is None
