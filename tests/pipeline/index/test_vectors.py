"""index with vectors of another tool: the rows of a build in one process, in tasks that are not repeated."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import embed, index
from pipeline.index import shuffle
from pipeline.neighbors import neighbors
from pipeline.optout import optout
from pipeline.recipe import EmbedConfig, NeighborsConfig
from pipeline.web.blocklist import Blocklist
from retrieval import Database, Root, UserError, build_database
from retrieval.clip.encoder import Encoder
from retrieval.database.verify import damaged_files
from retrieval.imports import pieces, readers
from retrieval.imports.source import VectorsConfig
from retrieval.imports.source_rows import RowBlock
from retrieval.recipe import ClipConfig, IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from tests.pipeline.conftest import pictures, write_download
from tests.retrieval.conftest import DIM, clustered

pytestmark = pytest.mark.usefixtures("in_process_shards")
CONFIG = IndexConfig(rows_per_partition=60, num_queries=10, workers=2)
COUNTS = (130, 1, 90)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, pieces, groups and buckets that are smaller than the source here."""
    monkeypatch.setattr(readers, "BLOCK_ROWS", 16)
    monkeypatch.setattr(pieces, "PIECE_ROWS", 40)
    monkeypatch.setattr(shuffle, "ROWS_PER_GROUP", 75)
    monkeypatch.setattr(shuffle, "ROWS_PER_BUCKET", 100)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of clip-retrieval: bad vectors, ids twice in a file and in two files, and a further column."""
    folder = tmp_path / "source"
    for number, count in enumerate(COUNTS):
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        vectors = clustered(count, seed=number).astype(np.float16)
        vectors[3::40] = 0
        np.save(folder / f"img_emb/img_emb_{number}.npy", vectors)
        ids = np.arange(count) % 120 + 100 * number
        columns = {"url": [f"http://example.org/{i}.jpg" for i in ids], "caption": [f"{number} {n}" for n in ids]}
        table = pa.table(
            {"image_id": ids, **columns, "year": pa.array(ids / 2 if number else ids), "width": [0.5] * count}
        )
        pq.write_table(table, folder / f"metadata/metadata_{number}.parquet", row_group_size=20)
    return folder


def rows_of(database: Database) -> list[dict[str, object]]:
    """All rows with the bytes of their vectors, in the order of their ids."""
    database = database.with_all_rows()
    vectors = [vector.tobytes() for vector in database.embeddings()]
    table = database.metadata().append_column("vector", pa.array(vectors, pa.binary()))
    return list(table.sort_by(schema.IMAGE_ID).to_pylist())


def test_the_rows_are_those_of_a_build_in_one_process(source: Path, tmp_path: Path, clip: ClipConfig) -> None:
    root = Root(tmp_path / "run")
    manifest = index.run(CONFIG, root, clip, VectorsConfig(source=str(source)))
    expected = build_database(tmp_path / "db", source, encoder=Encoder(clip).identity, config=CONFIG)
    database = Database.open(root.child("index"))
    assert rows_of(database) == rows_of(expected)
    assert manifest.reasons == expected.manifest.reasons
    assert {*manifest.reasons} == {"bad_vector", "duplicate_id"}
    assert manifest.values["changed_values"] == expected.manifest.values["changed_values"] == {"width": sum(COUNTS)}
    assert database.encoder == expected.encoder
    nearest = np.argmax(database.embeddings().astype(np.float32) @ database.centroids.T, axis=1)
    assert (nearest == np.repeat(np.arange(4), database.partition_rows)).all()
    assert damaged_files(root.child("index")) == []
    assert not root.list("index/shuffle") + root.list("index/repeated") + root.list("index/records/shuffle")
    assert index.run(CONFIG, root, clip, VectorsConfig(source=str(source))) == manifest


def test_a_killed_shuffle_reads_only_the_pieces_of_unfinished_tasks_again(
    source: Path, tmp_path: Path, clip: ClipConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, read = Root(tmp_path / "run"), pieces.SourcePieces.read
    numbers: list[int] = []

    def counted(self: pieces.SourcePieces, number: int) -> Iterator[RowBlock]:
        if len(numbers) == 8 + 3:  # all pieces for the centroids, then two tasks and a part of the third
            raise KeyboardInterrupt
        numbers.append(number)
        return read(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pieces.SourcePieces, "read", counted)
        index.run(CONFIG, root, clip, VectorsConfig(source=str(source)))
    assert numbers == [*range(8), 0, 1, 2]
    numbers[:] = []
    monkeypatch.setattr(pieces.SourcePieces, "read", counted)
    index.run(CONFIG, root, clip, VectorsConfig(source=str(source)))
    assert numbers == [*range(2, 8)]
    expected = build_database(tmp_path / "db", source, encoder=Encoder(clip).identity, config=CONFIG)
    assert rows_of(Database.open(root.child("index"))) == rows_of(expected)


def test_another_source_needs_remake_and_one_without_usable_vectors_is_an_error(
    source: Path, tmp_path: Path, clip: ClipConfig
) -> None:
    root = Root(tmp_path / "run")
    manifest = index.run(CONFIG, root, clip, VectorsConfig(source=str(source)))
    assert [*manifest.values["clip_files"]] == ["open_clip_model.safetensors"]  # `make status` compares them
    np.save(tmp_path / "zeros.npy", np.zeros((9, DIM), np.float16))
    zeros = VectorsConfig(source=str(tmp_path / "zeros.npy"))
    with pytest.raises(UserError, match=r"from another vectors.*--remake"):
        index.run(CONFIG, root, clip, zeros)
    with pytest.raises(UserError, match="no row is usable in 1 of 1 pieces"):
        index.run(CONFIG, root.remaking(), clip, zeros)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no vectors"):
        index.run(CONFIG, root, clip, VectorsConfig(source=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="inside of"):
        index.run(CONFIG, Root(source / "img_emb/run"), clip, VectorsConfig(source=str(source / "img_emb")))


def test_training_images_are_joined_with_them_and_erased_rows_do_not_come_back(
    source: Path, tmp_path: Path, clip: ClipConfig
) -> None:
    root = Root(tmp_path / "run")
    write_download(root, {"train/00000": pictures("train", 900, 6)})
    embed.run(EmbedConfig(workers=1), clip, root)
    index.run(CONFIG, root, clip, VectorsConfig(source=str(source)))
    config = NeighborsConfig(k=4, workers=1, recall_sample=0)
    assert neighbors.run(config, root).rows == 6
    table = schema.read_table(root, "neighbors/00000.parquet", schema.neighbors(4, DIM))
    erased = schema.vectors(table, schema.NEIGHBOR_IDS)[0, :2]
    urls = [f"http://example.org/{number}.jpg" for number in erased]
    report = optout.run(Blocklist(ids=np.sort([schema.image_id(url) for url in urls])), root, erase=True)
    assert report["databases"] == {"index": 2}
    manifests = [read_manifest(root, stage) for stage in ("index", "neighbors")]
    assert [index.run(CONFIG, root, clip, VectorsConfig(source=str(source))), neighbors.run(config, root)] == manifests
    table = pq.read_table(source / "metadata/metadata_0.parquet")
    other_ids = table.set_column(0, "image_id", pa.array(table["image_id"].to_numpy() + 10_000))
    pq.write_table(other_ids, source / "metadata/metadata_0.parquet")
    rebuilt = index.run(CONFIG, root.remaking(), clip, VectorsConfig(source=str(source)))
    ids = Database.open(root.child("index")).metadata()[schema.IMAGE_ID].to_numpy()
    assert not {*urls} & {*Database.open(root.child("index")).with_all_rows().metadata()["url"].to_pylist()}
    assert rebuilt.reasons["blocked"] >= 2
    assert (ids >= 10_000).any()
