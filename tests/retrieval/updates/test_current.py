"""A database that a server has opened while other processes change it."""

from pathlib import Path

import numpy as np
import pytest

from retrieval import Database, Root, delete_from_database
from retrieval.errors import NodeError
from retrieval.index.hidden import hide
from retrieval.updates import current
from retrieval.updates.current import CurrentDatabase
from tests.retrieval.conftest import built, clustered


@pytest.fixture
def root(tmp_path: Path) -> Root:
    built(tmp_path, clustered(60, seed=1))
    return Root(tmp_path / "databases/test")


def ids_of(database: Database) -> set[int]:
    """The ids that a search of all rows returns."""
    return set(database.search(np.ones((1, database.dim)), 60).ids[0].tolist())


def test_the_first_look_does_not_open_the_database_again(root: Root, monkeypatch: pytest.MonkeyPatch):
    database = Database.open(root)
    monkeypatch.setattr(current.Database, "open", lambda *args: pytest.fail("the database was opened again"))
    assert CurrentDatabase(database).get() is database


def test_images_that_are_hidden_or_deleted_later_are_not_returned(root: Root, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(current, "LOOK_EVERY_S", 0.0)
    hide(root, [1000])
    opened = CurrentDatabase(Database.open(root))
    first, everything = opened.get(), set(range(1001, 1060))
    assert (opened.get() is first, ids_of(first)) == (True, everything)
    hide(root, [1003, 1000])
    assert ids_of(opened.get()) == everything - {1003}
    delete_from_database(root, [1007])
    assert ids_of(opened.get()) == everything - {1003, 1007}
    assert (len(opened.get()), opened.get() is opened.get()) == (59, True)


def test_a_database_that_is_built_again_is_searched_until_then_without_images_that_are_hidden(
    root: Root, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(current, "LOOK_EVERY_S", 0.0)
    opened = CurrentDatabase(Database.open(root))
    ids_of(opened.get())
    hide(root, [1003])
    root.delete("manifest.json")
    assert ids_of(opened.get()) == set(range(1000, 1060)) - {1003}


def test_files_are_read_once_in_some_seconds_and_a_store_that_does_not_respond_changes_nothing(
    root: Root, monkeypatch: pytest.MonkeyPatch
):
    now: list[float] = [0.0]
    reads: list[str] = []
    monkeypatch.setattr(current.time, "monotonic", lambda: now[0])
    opened = CurrentDatabase(Database.open(root))

    def fail(self: Root, name: str) -> bytes:
        reads.append(name)
        raise NodeError("the store does not respond")

    first = opened.get()
    monkeypatch.setattr(Root, "read_bytes", fail)
    for seconds in (0.0, 1.0, 2.9, 3.0, 3.1):
        now[0] = seconds
        assert opened.get() is first
    assert reads == ["manifest.json"]
