"""Updates of a partition whose index was damaged are refused: they copy the entries of its lists."""

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from retrieval import Database, Root, UserError, delete_from_database
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
