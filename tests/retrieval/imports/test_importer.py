"""A database of vectors that do not fit in memory equals one of a table in memory."""

import hashlib
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval import Database, Root, UserError
from retrieval.database import build
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.database.calibration import recalibrate
from retrieval.imports import importer, readers
from retrieval.imports.importer import build_database
from retrieval.imports.source import VectorSource
from retrieval.imports.source_rows import read_database_blocks, scan_rows
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.lease import end_erasure, lease, start_erasure
from retrieval.updates.add import add_to_database
from tests.retrieval.conftest import DIM, IDENTITY, clustered

CONFIG = IndexConfig(rows_per_partition=100, num_queries=10)
COUNTS = (300, 1, 250)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, groups and a sample that are smaller than the sources here."""
    monkeypatch.setattr(readers, "BLOCK_ROWS", 16)
    monkeypatch.setattr(importer, "ROWS_PER_GROUP", 90)
    monkeypatch.setattr(build, "CENTROID_SAMPLE_ROWS", 400)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clip-retrieval folder of three files with bad vectors, ids that occur twice and a column of several types."""
    folder = tmp_path / "source"
    for number, count in enumerate(COUNTS):
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        rows = clustered(count, seed=number).astype(np.float16)
        rows[3::40] = 0
        np.save(folder / f"img_emb/img_emb_{number}.npy", rows)
        ids = np.arange(number * 100, number * 100 + count)
        year = pa.array(ids, pa.int16()) if number == 1 else pa.array(ids / 2)
        table = pa.table({"image_id": ids, "caption": [f"picture {number} {i}" for i in ids], "year": year})
        pq.write_table(table, folder / f"metadata/metadata_{number}.parquet")
    return folder


def checksums(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def in_memory(folder: Path, root: Root) -> Database:
    """The database of the rows of a folder, put together in memory."""
    tables = [block.table for block in read_database_blocks(VectorSource(folder), DIM)]
    table = pa.concat_tables(tables, promote_options="permissive")
    ids = table[schema.IMAGE_ID].to_pylist()
    table = table.take([ids.index(one) for one in sorted(set(ids), key=ids.index)])
    write_database(root, table.combine_chunks(), IDENTITY, CONFIG, DatabaseIdentity("db", {}))
    return Database.open(root.child("db"))


def test_a_build_from_files_equals_a_build_from_a_table(folder: Path, tmp_path: Path) -> None:
    database = build_database(tmp_path / "streamed/db", folder, encoder=IDENTITY, config=CONFIG)
    expected = in_memory(folder, Root(tmp_path / "memory"))
    assert checksums(tmp_path / "streamed") == checksums(tmp_path / "memory")
    assert len(database.partitions) > 3
    assert len(database) == len(expected) < 460
    assert database.manifest.reasons == {"bad_vector": 15, "duplicate_id": sum(COUNTS) - 15 - len(expected)}
    assert database.manifest.values == expected.manifest.values


def test_a_build_that_is_killed_in_the_shuffle_is_replaced_by_the_next(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(tmp_path / "db")
    build_database(root, clustered(20, seed=1), encoder=IDENTITY, config=CONFIG)
    (tmp_path / "db/notes.txt").write_text("mine")
    (tmp_path / "db/README.md").write_text("the card of the database")
    recalibrate(root, np.ones((2, DIM)), "texts")
    (tmp_path / "db/manifest.json").unlink()
    (tmp_path / "db/shuffle-00000.arrow").write_bytes(b"of a build that was killed")
    (tmp_path / "db/.partial-0-manifest.json").write_bytes(b"of a build that was killed at its end")
    with pytest.raises(UserError, match=r"contains notes\.txt and is not a database"):
        build_database(root, folder, encoder=IDENTITY, config=CONFIG)
    (tmp_path / "db/notes.txt").unlink()
    assert len(build_database(root, folder, encoder=IDENTITY, config=CONFIG)) > 400
    assert not [*(tmp_path / "db").glob("shuffle*"), *(tmp_path / "db").glob(".partial*")]


def test_texts_of_another_length_are_refused_before_the_build(tmp_path: Path) -> None:
    build_database(tmp_path / "db", clustered(20, seed=1), encoder=IDENTITY)
    source = VectorSource(clustered(30, seed=2), text_queries=np.ones((3, DIM + 1)))
    with pytest.raises(UserError, match=rf"must be \(n, {DIM}\), got \(3, {DIM + 1}\)"):
        build_database(tmp_path / "db", source, encoder=IDENTITY)
    assert len(Database.open(str(tmp_path / "db"))) == 20  # the earlier database


def test_a_database_inside_its_source_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", clustered(30, seed=1))
    with pytest.raises(UserError, match=r"db is inside of .*Name a folder outside of it"):
        build_database(tmp_path / "new/db", tmp_path, encoder=IDENTITY, config=CONFIG)
    assert not (tmp_path / "new").exists()
    assert len(build_database(tmp_path / "_db", tmp_path, encoder=IDENTITY, config=CONFIG)) == 30


def test_a_database_may_lie_beside_the_folders_of_clip_retrieval(folder: Path) -> None:
    expected = len(build_database(folder / "db", folder, encoder=IDENTITY, config=CONFIG))
    assert len(build_database(folder / "db", folder, encoder=IDENTITY, config=CONFIG)) == expected > 400
    with pytest.raises(UserError, match=r"is inside of .*metadata"):
        source = VectorSource(folder / "img_emb", folder / "metadata")
        build_database(folder / "metadata/db", source, encoder=IDENTITY, config=CONFIG)


@pytest.mark.parametrize(
    ("ids", "found"), [([*range(40), 40], "more"), ([*range(39)], "fewer"), ([*range(38), 39, 38], "with other ids")]
)
def test_a_source_that_changes_during_the_build_is_an_error(tmp_path: Path, ids: list[int], found: str) -> None:
    def write(image_ids: list[int]) -> None:
        pq.write_table(pa.table({"image_id": image_ids, "vector": list(clustered(len(image_ids), seed=1))}), path)

    path = tmp_path / "vectors.parquet"
    write([*range(40)])
    rows = scan_rows(VectorSource(path), DIM)
    assert sum(map(len, rows.tables())) == 40
    write(ids)
    with pytest.raises(UserError, match=rf"vectors\.parquet got .*{found}.* while it was read"):
        list(rows.tables())


@pytest.mark.parametrize(("most_kept", "is_kept"), [(40, True), (39, False)])
def test_a_source_is_read_once_if_its_rows_are_kept(tmp_path: Path, most_kept: int, is_kept: bool) -> None:
    path = tmp_path / "vectors.parquet"
    pq.write_table(pa.table({"image_id": [*range(40)], "vector": list(clustered(40, seed=1))}), path)
    rows = scan_rows(VectorSource(path), DIM, most_kept)
    first = pa.concat_tables(rows.tables())
    path.unlink()
    if is_kept:
        assert pa.concat_tables(rows.tables()).equals(first)
    else:
        with pytest.raises(UserError, match=r"vectors\.parquet"):
            list(rows.tables())


@contextmanager
def peak_memory(peaks: list[int]) -> Iterator[None]:
    """Append the most bytes that NumPy and Arrow hold during the block to `peaks`."""
    ended = threading.Event()
    arrow = [before := pa.total_allocated_bytes()]

    def watch() -> None:
        while not ended.wait(0.001):
            arrow.append(pa.total_allocated_bytes())

    watcher = threading.Thread(target=watch)
    tracemalloc.start()
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        peaks.append(tracemalloc.get_traced_memory()[1] + max(arrow) - before)
        tracemalloc.stop()


def test_a_build_holds_a_fraction_of_the_vectors_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, dim, files = 500, 2048, 24  # 49 MB: threads that other tests left count too, and held 15 MB in one run
    monkeypatch.setattr(readers, "BLOCK_ROWS", 125)
    monkeypatch.setattr(importer, "ROWS_PER_GROUP", 250)
    source = tmp_path / "source"
    source.mkdir()
    random = np.random.default_rng(0)
    for number in range(files):
        vectors = random.random((rows, dim), np.float32) - 0.5
        np.save(source / f"{number}.npy", vectors.astype(np.float16))
    encoder = IDENTITY.model_copy(update={"dim": dim})
    config = IndexConfig(rows_per_partition=160, num_queries=5)
    peaks: list[int] = []
    with peak_memory(peaks):
        database = build_database(tmp_path / "db", source, encoder=encoder, config=config)
    assert len(database) == rows * files
    assert peaks[0] < 0.67 * rows * files * dim * 2


def test_a_build_is_refused_while_images_of_the_database_are_erased(tmp_path: Path) -> None:
    root = build_database(tmp_path / "db", clustered(20, seed=1), encoder=IDENTITY).root
    start_erasure(root, "list", "plan.json")
    with pytest.raises(UserError, match="'optout --erase' with the list list has not ended there"):
        build_database(tmp_path / "db", clustered(30, seed=2), encoder=IDENTITY)
    end_erasure(root, "list")
    assert len(build_database(tmp_path / "db", clustered(30, seed=2), encoder=IDENTITY)) == 30


def test_an_update_during_a_build_names_the_process_that_builds(tmp_path: Path) -> None:
    root = Root(tmp_path / "db")
    with lease(root, "update"), pytest.raises(UserError, match=r"process \d+ on .* has worked on it since"):
        add_to_database(root, clustered(3, seed=1))


def test_a_second_build_is_refused_before_it_reads_its_source(tmp_path: Path) -> None:
    root = Root(tmp_path / "db")
    with lease(root, "update"), pytest.raises(UserError, match=r"process \d+ on .* has worked on it since"):
        build_database(root, tmp_path / "missing.npy", encoder=IDENTITY)
