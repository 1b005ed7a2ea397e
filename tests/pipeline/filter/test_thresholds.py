"""Each threshold drops rows below or above it and rows without the value, in both splits, with its own reason."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.filter.metadata import plan_pieces
from pipeline.filter.selection import RULE_COLUMNS, Rules, apply_rules, rule_columns
from pipeline.recipe import FilterConfig
from pipeline.web.blocklist import Blocklist
from retrieval.errors import UserError

ROW = {"url": "http://a.org/1", "width": 800, "height": 800, "pwatermark": 0.1, "punsafe": 0.1}
KEPT: dict[str, int] = {}


def config(**settings: object) -> FilterConfig:
    return FilterConfig(metadata="metadata", **settings)


def reasons(settings: dict[str, object], **columns: object) -> dict[str, int]:
    """Why a row with these columns is dropped."""
    rules = Rules(config(**settings), Blocklist())
    row = ROW | columns
    return apply_rules(pa.record_batch([[value] for value in row.values()], list(row)), 0, rules)[2]


@pytest.mark.parametrize(
    ("settings", "column", "kept", "dropped"),
    [
        ({"min_similarity": 0.3}, "similarity", [0.3, "0.4", 1], {"low_similarity": [0.29, -1, "0"]}),
        ({"min_similarity": 0.3}, "similarity", [], {"no_score": [None, float("nan"), "high"]}),
        ({"min_aesthetic": 5.0}, "aesthetic", [5.0, 9], {"low_aesthetic": [4.99], "no_score": [None]}),
        (
            {"languages": ("en", "zh-TW")},
            "language",
            ["en", b"EN ", "zh-tw"],
            {"other_language": ["de", "", None, "e"]},
        ),
        ({"min_caption_chars": 3}, "caption", ["größe", "öäü"], {"caption_length": ["öä", "", None]}),
        ({"max_caption_chars": 3}, "caption", ["öäü", "", None, 123], {"caption_length": ["four", "x" * 9999]}),
        ({"max_aspect_ratio": 2.5}, "width", [800, 2000, 320], {"aspect_ratio": [2001, 319]}),
    ],
)
def test_a_threshold_drops_rows_beyond_it_and_rows_without_the_value(
    settings: dict[str, object], column: str, kept: list[object], dropped: dict[str, list[object]]
) -> None:
    for value in kept:
        assert reasons(settings, **{column: value}) == KEPT, value
    for reason, values in dropped.items():
        for value in values:
            assert reasons(settings, **{column: value}) == {reason: 1}, value


def test_thresholds_hold_for_rows_of_the_database_too() -> None:
    assert reasons({"min_similarity": 0.3}, width=100, similarity=0.4) == KEPT
    assert reasons({"min_similarity": 0.3}, width=100, similarity=0.2) == {"low_similarity": 1}


def test_a_ratio_needs_the_sizes_even_where_rows_without_sizes_are_kept() -> None:
    assert reasons({"missing_size": "keep"}, width=None) == KEPT
    assert reasons({"missing_size": "keep", "max_aspect_ratio": 2.0}, width=None) == {"bad_size": 1}


def test_rows_without_several_scores_are_counted_once_and_together() -> None:
    columns = {name: [value] * 3 for name, value in ROW.items()}
    batch = pa.record_batch(columns | {"similarity": [None, 0.5, 0.1], "aesthetic": [6.0, None, 1.0]})
    rules = Rules(config(min_similarity=0.3, min_aesthetic=5.0), Blocklist())
    assert apply_rules(batch, 0, rules)[2] == {"no_score": 2, "low_similarity": 1}


def test_the_scan_reads_a_column_only_for_a_threshold_that_is_on() -> None:
    assert rule_columns(config()) == RULE_COLUMNS
    assert rule_columns(config(max_aspect_ratio=2.0)) == RULE_COLUMNS
    settings = {"languages": ["en"], "min_caption_chars": 1, "max_caption_chars": 9}
    assert rule_columns(config(**settings)) == (*RULE_COLUMNS, "language", "caption")


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"min_similarity": 0.3}, "similarity"),
        ({"min_aesthetic": 5.0}, "aesthetic"),
        ({"languages": ["en"]}, "language"),
        ({"max_aspect_ratio": 2.0, "missing_size": "keep"}, "width"),
    ],
)
def test_a_threshold_on_a_column_that_the_file_lacks_is_an_error_that_names_both(
    tmp_path: Path, settings: dict[str, object], missing: str
) -> None:
    names = {"url": "u", "text": "c", "height": 8, "pwatermark": 0.1, "punsafe": 0.1}
    pq.write_table(pa.Table.from_pylist([names]), tmp_path / "a.parquet")
    given = {"metadata": str(tmp_path), "missing_size": "keep"}
    plan_pieces(FilterConfig(**given), {})
    message = rf"a\.parquet has no column '{missing}'.*remove the threshold filter\.{next(iter(settings))}"
    with pytest.raises(UserError, match=message):
        plan_pieces(FilterConfig(**(given | settings)), {})


@pytest.mark.parametrize("settings", [{"max_aspect_ratio": 0.5}, {"max_caption_chars": 3, "min_caption_chars": 4}])
def test_thresholds_that_no_row_can_meet_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="must be 0 or at least"):
        config(**settings)
