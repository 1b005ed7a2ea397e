"""A partition with a damaged index is not updated, because updates copy the entries of its lists, and not searched."""

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from retrieval import Database, Effort, Root, UserError, delete_from_database
from retrieval.file_cache import FileCache
from retrieval.index.partition import Partition
from retrieval.storage.manifest import read_manifest


@pytest.fixture
def root(in_lists: Database, tmp_path: Path) -> Root:
    """A copy of the database with lists."""
    return Root(shutil.copytree(in_lists.root.local_path(""), tmp_path / "copy"))


def refuses_an_update(root: Root, index: object, message: str) -> None:
    path = root.local_path("partitions/00000/index.faiss")
    size = path.stat().st_size
    faiss.write_index(index, str(path))
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))  # else it would be refused by its size
    before = read_manifest(root, "")
    with pytest.raises(UserError, match=rf"index\.faiss cannot be read \({message}.*the database is damaged"):
        delete_from_database(root, [1001])
    assert read_manifest(root, "") == before


def foreign_index(key: str, rows: int, dim: int = 32) -> object:
    """An index of other vectors."""
    vectors = np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)
    index = faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    return index


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (foreign_index("IVF8,Flat", 3500), r"ids of its lists are not in \[0, 3,000\)"),
        (foreign_index("PCA16,IVF8,Flat", 3500), r"ids of its lists are not in \[0, 3,000\)"),
        (foreign_index("HNSW8", 3500), "rows: 3,500, expected 3,000"),
        (foreign_index("HNSW8", 3000, dim=16), "dimensions: 16, expected 32"),
        (foreign_index("Flat", 3000), "it is IndexFlat.*, expected lists .* or a graph"),
    ],
)
def test_an_index_of_another_kind_that_does_not_fit_the_rows_is_not_searched(
    root: Root, index: object, message: str
) -> None:
    for name in ("lists.npy", "list_centroids.npy"):
        root.delete(f"partitions/00000/{name}")
    faiss.write_index(index, str(root.local_path("partitions/00000/index.faiss")))
    queries = np.eye(200, 32, dtype=np.float32) + 0.1
    partition = Partition.open(FileCache(root), "partitions/00000", 32, np.empty(0, np.int64))
    with pytest.raises(UserError, match=rf"index\.faiss cannot be read \({message}.*Build it again"):
        partition.search(queries, 20, Effort(1, 2, 4))


@pytest.mark.parametrize("row", [-5, 3000])
def test_an_index_with_an_id_of_no_row_is_not_updated(root: Root, row: int) -> None:
    index = faiss.read_index(str(root.local_path("partitions/00000/index.faiss")))
    filled = next(number for number in range(index.nlist) if index.invlists.list_size(number))
    faiss.rev_swig_ptr(index.invlists.get_ids(filled), 1)[0] = row
    refuses_an_update(root, index, r"ids of its lists are not in \[0, 3,000\)")


def test_an_index_of_another_kind_is_not_updated(root: Root) -> None:
    lists = len(np.load(root.local_path("partitions/00000/lists.npy"))) - 1
    index = faiss.IndexFlatIP(32)
    refuses_an_update(root, index, f"it is no index of {lists} lists")
