from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from pipeline.filter.selection import (
    AS_IT_IS,
    DUPLICATE,
    KEY_SCHEMA,
    NO_LIMIT,
    TO_DATABASE,
    UNSAFE,
    Rules,
    apply_rules,
    compare_rows,
    rank_threshold,
    split_into_buckets,
    training_ranks,
)
from pipeline.recipe import FilterConfig
from pipeline.web.blocklist import Blocklist
from retrieval.storage.schema import image_id

RULES = Rules(FilterConfig(metadata="metadata"), Blocklist())


def rules(**settings: object) -> Rules:
    return Rules(FilterConfig(metadata="metadata", **settings), Blocklist())


def apply_to_row(rules: Rules = RULES, **columns: object) -> tuple[list[tuple[int, bool]], dict[str, int]]:
    row = {"url": "http://a.org/1", "width": 800, "height": 800, "pwatermark": 0.1, "punsafe": 0.1} | columns
    keys, _, reasons = apply_rules(pa.record_batch([[value] for value in row.values()], list(row)), 100, rules)
    keys = keys.filter(keys["kept"])
    return list(zip(keys["row"].to_pylist(), keys["train"].to_pylist(), strict=True)), reasons


@pytest.mark.parametrize(
    ("columns", "train"),
    [
        ({}, True),
        ({"width": 768, "height": 768}, True),
        ({"width": 767}, False),
        ({"height": 12}, False),
        ({"width": "800"}, True),
        ({"pwatermark": 0.8}, False),
        ({"pwatermark": 0.79}, True),
    ],
)
def test_small_or_watermarked_rows_go_to_the_database(columns: dict[str, object], train: bool) -> None:
    assert apply_to_row(**columns) == ([(100, train)], {})


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"url": "file:///etc/passwd"}, "bad_url"),
        ({"url": None}, "bad_url"),
        ({"url": b"http://a.org/\xff"}, "bad_url"),
        ({"width": 0}, "bad_size"),
        ({"height": -5}, "bad_size"),
        ({"height": None}, "bad_size"),
        ({"width": "wide"}, "bad_size"),
        ({"width": 1 << 31}, "bad_size"),
        ({"width": float("nan")}, "bad_size"),
        ({"width": 800.5}, "bad_size"),
        ({"punsafe": None}, "no_score"),
        ({"pwatermark": float("nan")}, "no_score"),
        ({"punsafe": "low"}, "no_score"),
        ({"punsafe": 0.5}, "unsafe"),
        ({"punsafe": 0.5, "url": "data:,"}, "bad_url"),
    ],
)
def test_a_dropped_row_has_one_reason(columns: dict[str, object], reason: str) -> None:
    assert apply_to_row(**columns) == ([], {reason: 1})


def test_only_urls_that_were_not_canonical_are_corrected() -> None:
    urls = ["http://a.org/1", "HTTP://a.org/2#x", "ftp://a.org/3", None]
    columns = dict.fromkeys(("width", "height", "pwatermark", "punsafe"), [0] * 4)
    _, corrected, _ = apply_rules(pa.record_batch({"url": urls, **columns}), 100, RULES)
    assert corrected.to_pylist() == [{"row": 101, "url": "http://a.org/2"}]


def test_each_missing_value_can_be_accepted_while_unsafe_rows_are_dropped() -> None:
    keep = rules(missing_watermark="keep", missing_safety="keep")
    assert apply_to_row(keep, punsafe=None, pwatermark=None) == ([(100, True)], {})
    assert apply_to_row(keep, punsafe=0.9, pwatermark=None) == ([], {"unsafe": 1})
    assert apply_to_row(keep, width=None) == ([], {"bad_size": 1})
    keep = rules(missing_watermark="keep")
    assert apply_to_row(keep, pwatermark=None) == ([(100, True)], {})
    assert apply_to_row(keep, punsafe=None) == ([], {"no_score": 1})
    keep = rules(missing_size="keep")
    assert apply_to_row(keep, width=None, height=None) == ([(100, True)], {})
    assert apply_to_row(keep, width=700) == ([(100, False)], {})
    assert apply_to_row(keep, width=None, pwatermark=0.9) == ([(100, False)], {})


def test_a_score_that_cannot_be_read_is_not_taken_for_a_missing_one() -> None:
    keep = rules(missing_watermark="keep", missing_safety="keep")
    for name in ("punsafe", "pwatermark"):
        for value in ("0,9", "90%", "true", "inf", b"\xff", float("inf")):
            assert apply_to_row(keep, **{name: value}) == ([], {"no_score": 1}), value
        for value in (None, "", " ", "NaN", "None", "null", "N/A", float("nan")):
            assert apply_to_row(keep, **{name: value}) == ([(100, True)], {}), value


def test_a_listed_image_is_blocked() -> None:
    listed = replace(RULES, blocklist=Blocklist(np.array([image_id("http://a.org/1")])))
    assert apply_to_row(listed) == ([], {"blocked": 1})
    assert apply_to_row(replace(RULES, blocklist=Blocklist(domains=frozenset({"a.org"})))) == ([], {"blocked": 1})


def keys_of(ids: list[int], check: list[int], **columns: list[bool]) -> pa.Table:
    n = len(ids)
    masks = {"kept": [True] * n, "train": [True] * n, "unsafe": [False] * n, "watermarked": [False] * n} | columns
    return pa.table([ids, check, list(range(n)), *masks.values()], schema=KEY_SCHEMA)


def test_every_later_row_of_an_id_is_a_duplicate() -> None:
    decisions, collisions = compare_rows(keys_of([5, 7, 5, 9, 5, 7], [1, 2, 1, 3, 1, 2]))
    assert (decisions == DUPLICATE).tolist() == [False, False, True, False, True, True]
    assert collisions == 0


def test_the_first_row_of_an_id_stays_among_many_rows() -> None:
    ids = np.random.default_rng(0).integers(0, 3_000, 10_000)
    decisions, _ = compare_rows(keys_of(ids.tolist(), [0] * len(ids)))
    assert np.flatnonzero(decisions == AS_IT_IS).tolist() == sorted(np.unique(ids, return_index=True)[1].tolist())


def test_two_urls_with_one_id_are_a_collision() -> None:
    assert compare_rows(keys_of([5, 5, 6], [1, 2, 1]))[1] == 1


def test_a_url_is_unsafe_or_watermarked_if_any_of_its_rows_is() -> None:
    ids = [1, 1, 2, 2, 3, 3, 4, 4, 4, 5]
    dropped, watermarked = {1, 2, 4, 8}, {4, 6, 7}
    keys = keys_of(
        ids,
        [0] * len(ids),
        kept=[n not in dropped for n in range(10)],
        unsafe=[n in {1, 2, 8} for n in range(10)],
        watermarked=[n in watermarked for n in range(10)],
    )
    expected = [UNSAFE, AS_IT_IS, AS_IT_IS, UNSAFE, AS_IT_IS, TO_DATABASE, UNSAFE, UNSAFE, AS_IT_IS, AS_IT_IS]
    assert compare_rows(keys)[0].tolist() == [int(decision) for decision in expected]


def test_dropped_rows_still_say_what_is_known_of_their_url() -> None:
    columns = {"url": ["http://a.org/1"] * 4, "width": [0, 800, 800, 800], "height": [800] * 4}
    scores = {"pwatermark": [0.1, None, 0.9, 0.1], "punsafe": [0.9, 0.9, None, None]}
    keys, _, reasons = apply_rules(pa.record_batch(columns | scores), 0, RULES)
    assert keys.select(["row", "kept", "unsafe", "watermarked"]).to_pylist() == [
        {"row": 0, "kept": False, "unsafe": True, "watermarked": False},
        {"row": 1, "kept": False, "unsafe": True, "watermarked": False},
        {"row": 2, "kept": False, "unsafe": False, "watermarked": True},
    ]
    assert reasons == {"bad_size": 1, "no_score": 3}


def test_buckets_are_disjoint_complete_and_ordered() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 1000)
    buckets = split_into_buckets(keys_of(ids.tolist(), [0] * 1000), 8)
    assert len(buckets) == 8
    assert sum(bucket.num_rows for bucket in buckets) == 1000
    sets = [set(bucket["image_id"].to_pylist()) for bucket in buckets]
    assert len(set().union(*sets)) == sum(len(ids) for ids in sets)
    assert all(bucket["row"].to_pylist() == sorted(bucket["row"].to_pylist()) for bucket in buckets)


@pytest.mark.parametrize("count", [1, 2, 500, 999])
def test_exactly_count_ranks_are_below_the_threshold(count: int) -> None:
    values = training_ranks(np.arange(1000), seed=3)
    limit = rank_threshold(lambda: np.array_split(values, 7), count)
    assert (values <= np.uint64(limit)).sum() == count


def test_there_is_no_threshold_if_the_quota_is_not_reached() -> None:
    assert rank_threshold(lambda: [training_ranks(np.arange(10), 0)], 10) == NO_LIMIT


def test_ranks_within_one_histogram_bin_are_distinguished() -> None:
    close = np.arange(100, dtype=np.uint64) + np.uint64(1 << 60)
    assert rank_threshold(lambda: [close], 40) == (1 << 60) + 39


def test_another_seed_gives_another_order_without_ties() -> None:
    ids = np.arange(10_000)
    first, second = training_ranks(ids, 0), training_ranks(ids, 1)
    assert len(np.unique(first)) == 10_000
    overlap = set(np.argsort(first)[:1000]) & set(np.argsort(second)[:1000])
    assert 50 < len(overlap) < 160
