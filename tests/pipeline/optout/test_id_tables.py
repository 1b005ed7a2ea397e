"""The tables of ids name every shard and row of a list, and are made once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.optout import id_tables
from pipeline.optout.id_tables import look_up, table_names, update_tables, write_id_table
from pipeline.runtime.workers import Workers
from retrieval import Root
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from tests.pipeline.conftest import pictures, write_download
from tests.pipeline.shards_in_process import shards_in_process


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    with shards_in_process():
        yield


def written(root: Root) -> dict[str, int]:
    """When each table was written."""
    return {name: root.local_path(name).stat().st_mtime_ns for name in root.list("optout/ids", ".npy")}


def test_a_look_up_gives_all_values_of_the_ids(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keys = np.concatenate([rng.integers(-(2**63), 2**63, 1000), [7, 7, 7, -(2**63), 2**63 - 1]])
    values = np.arange(len(keys))
    root = Root(tmp_path)
    write_id_table(root, "x", keys, values)
    for ids in (np.unique([*keys[:1000:3], 5, 7, -(2**63), 2**63 - 1]), np.array([5]), np.empty(0, np.int64)):
        found, numbers = look_up(root, "x", ids)
        assert sorted(numbers) == np.flatnonzero(np.isin(keys, ids)).tolist()
        np.testing.assert_array_equal(keys[numbers], found)


def test_only_tables_of_changed_shards_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_tables, "SHARDS_PER_TABLE", 2)
    root = Root(tmp_path)
    shards = {f"train/{number:05d}": pictures("train", 10 * number, 3) for number in range(5)}
    write_download(root, shards)
    update_tables(root, table_names(root, []), Workers(1))
    before = written(root)
    assert len(before) == 3
    shards["train/00003"] = pictures("more", 30, 4)
    write_download(root, shards)
    tables = table_names(root, [])
    update_tables(root, tables, Workers(1))
    after = written(root)
    assert [name for name in after if after[name] != before[name]] == ["optout/ids/download/00001.npy"]
    wanted = schema.image_id(shards["train/00003"][2].url)
    for name, group in tables.pictures.items():
        _, numbers = look_up(root, name, np.array([wanted]))
        assert [group[number] for number in numbers] == (["train/00003"] if name == "download/00001" else [])


def test_a_row_is_found_by_its_id_and_by_the_url_of_its_picture(tmp_path: Path) -> None:
    urls = [picture.url for picture in pictures("database", 0, 4)]
    rows = [
        {schema.IMAGE_ID: 100 + number, "url": url, "caption": "", "license": None, "width": 9, "height": 9}
        for number, url in enumerate([*urls, *urls, "ink/no-url.jpg"])
    ]
    vectors = np.random.default_rng(0).standard_normal((9, 16)).astype(np.float16)
    field = schema.embeddings(16).field(schema.EMBEDDING)
    table = pa.Table.from_pylist(rows, schema.METADATA).append_column(field, schema.fixed_lists(vectors))
    encoder = EncoderIdentity(model="none", weights="0" * 16, preprocessing="", dim=16)
    root = Root(tmp_path)
    write_database(root, table, encoder, IndexConfig(), DatabaseIdentity("databases/ink", {}))
    update_tables(root, table_names(root, ["databases/ink"]), Workers(1))
    _, found = look_up(root, "databases/ink/00000", np.unique([schema.image_id(urls[2]), 108]))
    assert sorted(found) == [102, 106, 108]
