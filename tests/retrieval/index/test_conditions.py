"""Conditions on metadata: what a text means, what is refused, and searches among the rows that meet one."""

from datetime import date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from retrieval import Database
from retrieval.errors import UserError
from retrieval.index.conditions import EXAMPLE, parse_complement, parse_condition, rows_that_meet
from retrieval.index.effort import Effort
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors
from tests.retrieval.conftest import brute_force, built, clustered

ROWS = pa.table(
    {
        "image_id": [1, 2, 3, 4],
        "width": pa.array([300, 768, 1024, 2000], pa.int32()),
        "license": ["cc0", "cc-by", None, "all rights"],
        "caption": ["The Sea", "a wood", "seaside", "it's late"],
        "day": [date(2020, 1, 1), date(2021, 6, 1), None, date(2022, 3, 1)],
        "taken": [datetime(2020, 1, 1, 5), datetime(2021, 6, 1), None, datetime(2022, 3, 1, 12)],
    }
)
NUM_ROWS = 20_000


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("width >= 768", [2, 3, 4]),
        ("300 < width < 2000", [2, 3]),
        ("1000 <= width", [3, 4]),
        ("width == 768 or license == 'cc0'", [1, 2]),
        ("license in ['cc0', 'cc-by'] and width != 300", [2]),
        ("license not in ('cc0',)", [2, 4]),
        ("not license in ['cc0']", [2, 4]),
        ("not width < 1000", [3, 4]),
        ("'sea' in caption", [1, 3]),
        ("'sea' not in caption", [2, 4]),
        ("license is None", [3]),
        ("license is not None", [1, 2, 4]),
        ("license != 'cc0'", [2, 4]),
        ('caption == "it\'s late"', [4]),
        ("image_id in [4, 1, 99]", [1, 4]),
        (EXAMPLE, []),
        ("license in []", []),
        ("license not in []", [1, 2, 4]),
        ("width in ()", []),
        ("day >= date('2021-06-01')", [2, 4]),
        ("not day < date('2021-06-01')", [2, 4]),
        ("day not in [date('2021-06-01'), date('1999-01-01')]", [1, 4]),
        ("date('2020-02-01') < taken < datetime('2022-03-01T12:00')", [2]),
        ("taken in [datetime('2022-03-01 12:00')]", [4]),
    ],
)
def test_a_text_selects_rows(text: str, ids: list[int]) -> None:
    meets = rows_that_meet(parse_condition(text), ROWS)
    assert ROWS["image_id"].to_numpy()[meets].tolist() == ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        "width",
        "width >",
        "1 < 2",
        "width = 3",
        "__import__('os').system('true') == 1",
        "width >= len(caption)",
        "width.real > 1",
        "license == None",
        "width is 3",
        "3 in width",
        "width in 3",
        "width > 1; width < 2",
        "(" * 100_000,
        "-" * 100_000 + "1 < width",
        "width in [" + "1," * 1_000_000 + "]",
        "width in [1, 'a']",
        "width in [caption]",
        "day > date('1 June')",
        "day > date('2021-06-01', 'x')",
        "day > date(2021)",
        "day > date(other)",
        "day > time('12:00')",
        "width > {}",
        "width >= " + "1" * 30,
        "width in [" + "1" * 30 + "]",
    ],
)
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match=r"condition .*Write it as in: width >= 768") as error:
        parse_condition(text)
    assert len(str(error.value)) < 1000
    assert "malformed" not in str(error.value)


def test_a_thousand_comparisons_are_the_most() -> None:
    assert rows_that_meet(parse_condition(" or ".join(["width == 1"] * 999 + ["width == 300"])), ROWS).sum() == 1
    for text in ("width == 1" + " or width == 1" * 60_000, "not (1 < width" + " < 2" * 1000 + ")"):
        with pytest.raises(UserError, match=r"comparisons, at most 1,000 are allowed: write `column in"):
            parse_condition(text)


@pytest.mark.parametrize("text", ["size > 3", "width == 'wide'", "'sea' in width"])
def test_a_condition_on_other_columns_or_types_names_the_columns(text: str) -> None:
    with pytest.raises(UserError, match=r"The columns are image_id \(int64\), width \(int32\)"):
        rows_that_meet(parse_condition(text), ROWS)


def test_an_unknown_column_and_values_that_are_no_truth_values_are_named() -> None:
    with pytest.raises(UserError, match=r"condition \(size > 3\): there is no column size\. The columns are"):
        rows_that_meet(parse_condition("size > 3"), ROWS)
    for name, kind in (("width", "int32"), ("caption", "string")):
        with pytest.raises(UserError, match=f"its values are of type {kind}, expected truth values"):
            rows_that_meet(pc.field(name), ROWS)


@pytest.mark.parametrize("condition", [None, 5, b"width > 3", np.ones(9, bool)])
def test_a_condition_that_is_neither_text_nor_expression_is_refused(in_lists: Database, condition: object) -> None:
    with pytest.raises(UserError, match=rf"a condition is a text or .*Expression, got {type(condition).__name__}$"):
        in_lists.where(condition)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """A database of two partitions with inverted lists."""
    return built(tmp_path_factory.mktemp("large"), rows(), rows_per_partition=NUM_ROWS // 2, flat_rows=2000)


def rows() -> Vectors:
    return clustered(NUM_ROWS, seed=0)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.3, 0.1, 0.01, 0.001])
def test_the_requested_recall_holds_among_the_rows_that_meet_a_condition(large: Database, share: float) -> None:
    chosen = 1000 + np.random.default_rng(3).permutation(NUM_ROWS)[: int(share * NUM_ROWS)]
    assert recall(large, np.sort(chosen)) > 0.94


def test_the_requested_recall_holds_where_a_condition_excludes_what_is_like_the_query(large: Database) -> None:
    similarities = rows() @ clustered(1, seed=11)[0]
    assert recall(large, 1000 + np.flatnonzero(similarities < np.quantile(similarities, 0.6))) > 0.94


def recall(database: Database, ids: np.ndarray) -> float:
    filtered, queries, k = database.where(pc.field("image_id").isin(ids.tolist())), clustered(40, seed=11), 20
    results = filtered.search(queries, k)
    assert np.isin(results.ids, ids).all()
    truth = ids[np.argsort(-(queries @ rows()[ids - 1000].T), axis=1)[:, :k]]
    return float(np.mean([len({*one} & {*other}) / len(one) for one, other in zip(truth, results.ids, strict=True)]))


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_recall_1_compares_all_rows_that_meet_a_condition(in_lists: Database, vectors: Vectors, share: float) -> None:
    chosen = np.flatnonzero(np.random.default_rng(3).random(len(vectors)) < share)
    filtered, queries = in_lists.where(pc.field("image_id").isin((1000 + chosen).tolist())), clustered(100, seed=11)
    assert filtered.partitions[0]._plan(1, filtered.effort(1.0, k=1)) == (Partition.compare_all, (1,))
    found = filtered.search(queries, 1, recall=1.0).ids - 1000
    np.testing.assert_array_equal(found, chosen[brute_force(vectors[chosen], queries, 1)])


def test_a_search_with_a_condition_skips_most_rows(large: Database) -> None:
    partition = large.where("image_id < 7000").partitions[0]
    visits = partition._lists_to_visit(clustered(40, seed=11), 5, 2)
    assert partition._skips_codes
    assert (visits > 2).any()
    assert (visits < partition.num_lists).all()


def test_fewer_rows_than_k_are_returned_once_each(large: Database) -> None:
    results = large.where("image_id in [1005, 1900, 1]").search(clustered(3, seed=11), 20)
    assert np.sort(results.ids, axis=1).tolist() == [[1005, 1900]] * 3
    nothing = large.where("image_id == 1").search(clustered(3, seed=11), 20)
    assert nothing.ids.shape == (3, 0)


def test_conditions_and_hidden_rows_add_up(large: Database) -> None:
    database = large.without([1003]).where("image_id < 1010").where("image_id > 1001").without([1004])
    assert set(database.search(clustered(1, seed=11), 20).ids[0]) == {1002, *range(1005, 1010)}
    everything = database.with_all_rows().search(clustered(1, seed=11), 20, effort=Effort(2, 10_000, 1))
    assert everything.ids.shape == (1, 20)


def test_the_rows_of_a_text_are_evaluated_once(large: Database, tmp_path: Path) -> None:
    assert large.where("width >= 10") is large.where("width >= 10")
    assert large.where("width >= 10").where("width >= 20") is not large.where("width >= 20")
    complement = large.where("width >= 10", parse_complement)
    assert large.where("width >= 10", parse_complement) is complement
    assert large.where("width >= 10") is not complement
    assert not large.without([1000]).where("image_id == 1000").search(clustered(1, seed=11), 1).ids.size
