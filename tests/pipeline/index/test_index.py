"""index: the database has every embedded row once and finds the nearest rows."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import embed, index
from pipeline.index import shuffle
from pipeline.recipe import EmbedConfig
from retrieval import Database, Effort, Root, UserError
from retrieval.arrow_files import read_number, write_by_number
from retrieval.index.hidden import hide
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from tests.pipeline.conftest import pictures, write_download

CONFIG = IndexConfig(rows_per_partition=15, workers=2)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory, clip: ClipConfig, in_process_shards: None) -> Path:
    """Three embedded shards of database images and one of training images."""
    folder = tmp_path_factory.mktemp("embedded")
    root = Root(folder)
    shards = {f"database/0000{i}": pictures(f"d{i}", 100 * i, 20) for i in range(3)}
    write_download(root, {"train/00000": pictures("train", 900, 4), **shards})
    embed.run(EmbedConfig(workers=1), clip, root)
    return folder


@pytest.fixture
def root(embedded: Path, tmp_path: Path) -> Root:
    """A copy of the embedded run that a test may change."""
    shutil.copytree(embedded, tmp_path, dirs_exist_ok=True)
    return Root(tmp_path)


def test_the_database_has_every_row_once_in_its_nearest_partition(root: Root) -> None:
    index.run(CONFIG, root)
    database = Database.open(root.child("index"))
    urls = database.metadata()["url"].to_pylist()
    assert len(urls) == len(set(urls)) == len(database) == 60
    assert len(database.partitions) == 4
    nearest = np.argmax(database.embeddings().astype(np.float32) @ database.centroids.T, axis=1)
    assert (nearest == np.repeat(np.arange(4), database.partition_rows)).all()


def test_a_stored_vector_finds_itself_first(root: Root) -> None:
    index.run(CONFIG, root)
    database = Database.open(root.child("index"))
    neighbors = database.search(database.embeddings().astype(np.float32), 3, effort=Effort(1, 1, 1))
    assert (neighbors.ids[:, 0] == database.metadata()[schema.IMAGE_ID].to_numpy()).mean() > 0.95
    assert neighbors.similarities[:, 0].min() > 0.99


def test_a_shuffle_in_several_groups_gives_the_same_rows(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    index.run(CONFIG, root)
    urls = sorted(Database.open(root.child("index")).metadata()["url"].to_pylist())
    root.delete("index")
    monkeypatch.setattr(shuffle, "ROWS_PER_GROUP", 25)
    manifest = index.run(CONFIG, root)
    assert sorted(Database.open(root.child("index")).metadata()["url"].to_pylist()) == urls
    assert manifest.rows == 60
    assert not root.exists("index/shuffle")


def test_searches_for_texts_are_calibrated_with_the_captions(root: Root, clip: ClipConfig) -> None:
    index.run(CONFIG, root, clip)
    database = Database.open(root.child("index"))
    assert {kind: entries[0].queries for kind, entries in database.calibration.items()} == {"images": 60, "texts": 60}
    root.delete("index")
    index.run(CONFIG, root)
    assert [*Database.open(root.child("index")).calibration] == ["images"]


def test_hidden_images_stay_hidden_in_a_rebuilt_index(root: Root) -> None:
    index.run(CONFIG, root)
    database = Database.open(root.child("index"))
    hidden, queries = database.metadata()[schema.IMAGE_ID].to_numpy()[:5], database.embeddings()[:5]
    hide(root.child("index"), hidden)
    index.run(CONFIG.model_copy(update={"seed": 1}), Root(root.url, remake=True))
    rebuilt = Database.open(root.child("index"))
    neighbors = rebuilt.search(queries, 55)
    assert rebuilt.manifest.config["seed"] == 1
    assert not np.isin(neighbors.ids, hidden).any()


def test_a_run_without_database_images_is_refused(tmp_path: Path, clip: ClipConfig, in_process_shards: None) -> None:
    root = Root(tmp_path)
    write_download(root, {"train/00000": pictures("train", 900, 4)})
    embed.run(EmbedConfig(workers=1), clip, root)
    with pytest.raises(UserError, match="no database images"):
        index.run(CONFIG, root)


def test_a_partition_is_read_from_a_shuffle_file_without_the_others(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 1_899, 50_000)  # the last partition is empty
    table = pa.table({"row": np.arange(50_000), "partition": numbers})
    root = Root(tmp_path)
    write_by_number(root, "shuffle.arrow", table, numbers, 1_900)
    for number in (0, 7, 1_899):
        rows = read_number(root, ["shuffle.arrow"], number)["row"].to_numpy()
        np.testing.assert_array_equal(rows, np.flatnonzero(numbers == number))
    with CountedFile(root.local_path("shuffle.arrow"), "rb") as file:
        pa.ipc.open_file(file).get_batch(7)
    assert file.num_bytes < 80_000


class CountedFile(io.FileIO):
    """A file that counts the bytes that are read."""

    num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.num_bytes += len(data)
        return data
