"""The card counts the rows that a search can show, and escapes markup in captions and licenses."""

from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest

from retrieval import Database, Root
from retrieval.cli.card import card
from retrieval.cli.commands import main
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.index.hidden import hide
from retrieval.recipe import IndexConfig
from tests.retrieval.conftest import IDENTITY, clustered, table_of

DAY = date(2026, 1, 2)
LICENSES = ["CC BY 4.0", None, "a|b\n# `c`", "CC BY 4.0"]
URLS = ["https://museum.example/1.jpg", "https://museum.example:8080/2.jpg", "folder/3.jpg", "http://[broken"]


@pytest.fixture
def database(tmp_path: Path) -> Database:
    """Four rows, ids 1000 to 1003, in two partitions; one row was left out."""
    table = table_of(clustered(4, seed=1))
    for name, values in (("license", LICENSES), ("url", URLS)):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(values))
    root = Root(tmp_path)
    identity = DatabaseIdentity("databases/four", {"source": "0123"}, {"unreadable": 1})
    write_database(root, table, IDENTITY, IndexConfig(rows_per_partition=2, num_queries=4), identity)
    return Database.open(root.child("databases/four"))


def test_a_card_counts_licenses_and_hosts(database: Database) -> None:
    lines = card(database, DAY).splitlines()
    assert "| CC BY 4.0 | 2 |" in lines
    assert "| not stated | 1 |" in lines
    assert "| museum.example | 2 |" in lines
    assert "| files of a folder | 1 |" in lines
    assert "| rows shown; hidden since the build | 4; 0 |" in lines
    assert "| left out by the build | 1 unreadable |" in lines
    assert "| written | 2026-01-02 |" in lines


def test_markup_in_a_license_stays_text(database: Database) -> None:
    assert "| a\\|b \\# \\`c\\` | 1 |" in card(database, DAY).splitlines()


def test_hidden_rows_are_counted_and_no_longer_listed(database: Database) -> None:
    hidden = int(database.partitions[0].ids[0])
    hide(database.root, [hidden])
    lines = card(Database.open(database.root), DAY).splitlines()
    assert "| rows shown; hidden since the build | 3; 1 |" in lines
    last_cells = [line.rsplit("|", 2)[1].strip() for line in lines if line.startswith("| ")]
    assert sum(int(cell) for cell in last_cells if cell.isdigit()) == 2 * 3


def test_one_line_sums_up_the_less_frequent_licenses(
    build: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieval.cli.card.MAX_VALUES", 0)
    assert "| 1 others | 30 |" in card(build(clustered(30, seed=1)), DAY).splitlines()


def test_card_write_puts_the_card_into_the_database_folder(database: Database) -> None:
    assert main(["card", database.root.url, "--write"]) == 0
    written = database.root.local_path("README.md").read_text()
    assert "| CC BY 4.0 | 2 |" in written
    assert Database.open(database.root).name == "four"
