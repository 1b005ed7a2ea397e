"""Pieces of a source have its rows, each once, and are read without the other rows."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval import Root, UserError
from retrieval.imports import npy_files, pieces, readers
from retrieval.imports.npy_files import NpyRows
from retrieval.imports.pieces import divide_source, source_identity
from retrieval.imports.source import VectorSource
from retrieval.imports.source_rows import read_database_blocks
from retrieval.storage import schema
from tests.retrieval.conftest import DIM, clustered

LAYOUTS = ("arrays", "arrays with metadata", "tables")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_ROWS", 4)
    monkeypatch.setattr(pieces, "PIECE_ROWS", 10)


def write_source(folder: Path, layout: str) -> VectorSource:
    """Three files: one has a column more, one a row group with more rows than a piece, two a row without a vector."""
    for name in ("vectors", "metadata"):
        (folder / name).mkdir(parents=True)
    for number, count in enumerate((23, 0, 17)):
        vectors = clustered(count, seed=number)
        vectors[5:6] = 0
        columns = {"caption": [f"{number} {n}" for n in range(count)], "year": pa.array(range(count), pa.int16())}
        table = pa.table(columns | ({"month": pa.array(range(count), pa.int8())} if number else {}))
        if layout == "tables":
            table = table.append_column("vector", schema.fixed_lists(vectors))
            pq.write_table(table, folder / f"vectors/{number}.parquet", row_group_size=(12, 1, 3)[number])
        else:
            np.save(folder / f"vectors/{number}.npy", vectors)
            pq.write_table(table, folder / f"metadata/{number}.parquet", row_group_size=(12, 1, 3)[number])
    with_metadata = layout == "arrays with metadata"
    return VectorSource(folder / "vectors", folder / "metadata" if with_metadata else None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pieces_have_the_rows_of_the_source(tmp_path: Path, layout: str) -> None:
    source = write_source(tmp_path, layout)
    divided = divide_source(source, DIM)
    blocks = [block for number in range(len(divided.pieces)) for block in divided.read(number)]
    expected = [block.table for block in read_database_blocks(source, DIM)]
    table = pa.concat_tables(expected, promote_options="permissive").select(divided.columns.names)
    assert pa.concat_tables(block.table for block in blocks).equals(table)
    assert len(table) == 38
    assert divided.columns == table.schema
    assert sum(sum(block.reasons.values()) for block in blocks) == 2
    sizes = [len(piece.rows) for piece in divided.pieces]
    assert sizes == ([8, 8, 7, 8, 9] if layout == "arrays" else [12, 11, 9, 8])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_loses_rows_is_an_error(tmp_path: Path, layout: str) -> None:
    source = write_source(tmp_path / "before", layout)
    divided = divide_source(source, DIM)
    identity = source_identity(source)
    shorter = tmp_path / "after"
    write_source(shorter, layout)
    for name in ("vectors/0", "metadata/0"):
        for path in shorter.glob(f"{name}.*"):
            target = tmp_path / "before" / path.relative_to(shorter)
            if path.suffix == ".npy":
                np.save(target, np.load(path, allow_pickle=False)[:20])
            else:
                pq.write_table(pq.read_table(path).slice(0, 20), target, row_group_size=12)
    assert source_identity(source) != identity
    last = [number for number, piece in enumerate(divided.pieces) if piece.file.name.startswith("0")][-1]
    with pytest.raises(UserError, match=r"has changed: .* Leave the files as they are"):
        list(divided.read(last))


def test_rows_of_an_array_in_an_object_store_are_read_without_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, vectors = Root("memory://npy-rows"), clustered(50, seed=1)
    np.save(tmp_path / "c.npy", vectors)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(vectors))
    for name in ("c.npy", "fortran.npy"):
        data = (tmp_path / name).read_bytes()
        root.write_bytes(name, data)
        root.write_bytes(f"cut-{name}", data[:-8])
        np.testing.assert_array_equal(NpyRows(root, name).read(30, 60), vectors[30:])
    monkeypatch.setattr(npy_files, "load_npy", None)
    rows = NpyRows(root, "c.npy")
    assert len(rows) == 50
    np.testing.assert_array_equal(rows.read(7, 12), vectors[7:12])
    with pytest.raises(UserError, match=r"cut-c\.npy has .* bytes, too few for its array \(50, "):
        NpyRows(root, "cut-c.npy")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (-1, DIM)})
    root.write_bytes("negative.npy", header.getvalue())
    with pytest.raises(UserError, match=r"negative\.npy has .* bytes, too few for its array \(-1, "):
        NpyRows(root, "negative.npy")
    root.write_bytes("c.npy", (tmp_path / "c.npy").read_bytes()[:-8])
    np.testing.assert_array_equal(rows.read(0, 40), vectors[:40])
    with pytest.raises(UserError, match=r"c\.npy ends before row 50"):
        rows.read(40, 50)
