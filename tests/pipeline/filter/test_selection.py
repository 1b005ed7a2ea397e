import numpy as np
import pyarrow as pa
import pytest

from pipeline.filter.selection import (
    KEYS,
    NO_LIMIT,
    Rules,
    by_bucket,
    identities,
    judge,
    ranks,
    repeats,
    threshold,
)
from pipeline.web.blocklist import Blocklist
from retrieval.storage.schema import image_id

RULES = Rules(min_edge=768, max_watermark=0.8, max_unsafe=0.5, missing_scores="drop", blocklist=Blocklist())


def judged(rules: Rules = RULES, **columns: object) -> tuple[list[tuple[int, bool]], dict[str, int]]:
    row = {"url": "http://a.org/1", "width": 800, "height": 800, "pwatermark": 0.1, "punsafe": 0.1} | columns
    keys, _, reasons = judge(pa.record_batch([[value] for value in row.values()], list(row)), 100, rules)
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
def test_small_or_marked_rows_are_kept_for_the_database(columns: dict[str, object], train: bool) -> None:
    assert judged(**columns) == ([(100, train)], {})


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
    assert judged(**columns) == ([], {reason: 1})


def test_urls_that_were_not_canonical_are_handed_on_and_no_others() -> None:
    urls = ["http://a.org/1", "HTTP://a.org/2#x", "ftp://a.org/3", None]
    columns = dict.fromkeys(("width", "height", "pwatermark", "punsafe"), [0] * 4)
    _, mended, _ = judge(pa.record_batch({"url": urls, **columns}), 100, RULES)
    assert mended.to_pylist() == [{"row": 101, "url": "http://a.org/2"}]


def test_missing_scores_can_be_let_through_while_bad_ones_still_count() -> None:
    keep = Rules(768, 0.8, 0.5, "keep", Blocklist())
    assert judged(keep, punsafe=None, pwatermark=None) == ([(100, True)], {})
    assert judged(keep, punsafe=0.9, pwatermark=None) == ([], {"unsafe": 1})


def test_a_listed_image_is_blocked() -> None:
    listed = Rules(768, 0.8, 0.5, "drop", Blocklist(np.array([image_id("http://a.org/1")])))
    assert judged(listed) == ([], {"blocked": 1})
    assert judged(Rules(768, 0.8, 0.5, "drop", Blocklist(domains=frozenset({"a.org"})))) == (
        [],
        {"blocked": 1},
    )


def test_column_ids_are_the_ids_of_single_urls() -> None:
    urls = [f"http://example.org/{n}" for n in range(50)]
    ids, check = identities(pa.array(urls))
    assert ids.tolist() == [image_id(url) for url in urls]
    assert len(set(check.tolist())) == 50


def keys_of(ids: list[int], check: list[int]) -> pa.Table:
    return pa.table([ids, check, list(range(len(ids))), [True] * len(ids)], schema=KEYS)


def test_every_later_row_of_an_id_repeats_the_first() -> None:
    later, collisions = repeats(keys_of([5, 7, 5, 9, 5, 7], [1, 2, 1, 3, 1, 2]))
    assert later.tolist() == [False, False, True, False, True, True]
    assert collisions == 0


def test_of_many_rows_too_the_first_of_an_id_is_the_one_that_stays() -> None:
    ids = np.random.default_rng(0).integers(0, 3_000, 10_000)
    later, _ = repeats(keys_of(ids.tolist(), [0] * len(ids)))
    assert np.flatnonzero(~later).tolist() == sorted(np.unique(ids, return_index=True)[1].tolist())


def test_two_urls_of_one_id_are_counted_as_a_collision() -> None:
    assert repeats(keys_of([5, 5, 6], [1, 2, 1]))[1] == 1


def test_buckets_share_no_id_lose_no_row_and_keep_the_order() -> None:
    ids = np.random.default_rng(0).integers(-(2**63), 2**63, 1000)
    buckets = by_bucket(keys_of(ids.tolist(), [0] * 1000), 8)
    assert len(buckets) == 8
    assert sum(bucket.num_rows for bucket in buckets) == 1000
    sets = [set(bucket["image_id"].to_pylist()) for bucket in buckets]
    assert len(set().union(*sets)) == sum(len(found) for found in sets)
    assert all(bucket["row"].to_pylist() == sorted(bucket["row"].to_pylist()) for bucket in buckets)


@pytest.mark.parametrize("count", [1, 2, 500, 999])
def test_the_threshold_lets_exactly_the_count_through(count: int) -> None:
    values = ranks(np.arange(1000), seed=3)
    limit = threshold(lambda: np.array_split(values, 7), count)
    assert (values <= np.uint64(limit)).sum() == count


def test_there_is_no_threshold_below_the_quota() -> None:
    assert threshold(lambda: [ranks(np.arange(10), 0)], 10) == NO_LIMIT


def test_ranks_within_one_histogram_bin_are_still_told_apart() -> None:
    close = np.arange(100, dtype=np.uint64) + np.uint64(1 << 60)
    assert threshold(lambda: [close], 40) == (1 << 60) + 39


def test_another_seed_ranks_otherwise_and_never_ties() -> None:
    ids = np.arange(10_000)
    first, second = ranks(ids, 0), ranks(ids, 1)
    assert len(np.unique(first)) == 10_000
    overlap = set(np.argsort(first)[:1000]) & set(np.argsort(second)[:1000])
    assert 50 < len(overlap) < 160
