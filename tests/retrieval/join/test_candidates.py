"""Candidates of a join: the same whatever is held at once, and no row worth ranking is missing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from retrieval import Database
from retrieval.index.routing import Vectors
from retrieval.join import candidates
from retrieval.join.candidates import CandidateSettings, find_candidates
from tests.retrieval.conftest import clustered

WANTED = CandidateSettings(k=8, lists_per_partition=16, near_copy_similarity=2.0)


def rows(database: Database, queries: Vectors, wanted: CandidateSettings = WANTED) -> list[list[int]]:
    return (
        find_candidates(database.partitions[0], torch.from_numpy(queries), wanted)[0].sort().values.tolist()
    )


@pytest.mark.parametrize(
    "limits",
    [
        {"ROWS_AT_ONCE": 32},
        {"PRODUCTS_AT_ONCE": 32},
        {"QUERIES_AT_ONCE": 7},
        {"ROUTED_AT_ONCE": 3},
        {"PAIRS_AT_ONCE": 50},
    ],
)
def test_candidates_do_not_depend_on_how_much_is_held(
    in_lists: Database, queries: Vectors, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    at_once = rows(in_lists, queries)
    for name, value in limits.items():
        monkeypatch.setattr(candidates, name, value)
    assert rows(in_lists, queries) == at_once


def test_no_row_of_the_visited_lists_beats_a_candidate_by_more_than_rounding(in_lists: Database) -> None:
    queries = clustered(200, seed=7)
    partition = in_lists.partitions[0]
    products = queries @ partition.embeddings.astype(np.float32).T
    everything = CandidateSettings(k=8, lists_per_partition=len(partition.lists[1]), near_copy_similarity=2.0)
    found, _ = find_candidates(partition, torch.from_numpy(queries), everything)
    best = -np.sort(-products, axis=1)[:, :8]
    chosen = -np.sort(-np.take_along_axis(products, found.numpy(), 1), axis=1)[:, :8]
    assert (best - chosen).max() < 2 * candidates.ROUNDING
    assert (best == chosen).mean() > 0.99


def test_rows_that_surely_are_copies_are_counted_instead(build: Callable[..., Database]) -> None:
    vectors = clustered(2000, seed=3)
    copied = np.concatenate([vectors, np.repeat(vectors[:5], 30, axis=0)])
    database = build(copied, flat_rows=1000)
    wanted = CandidateSettings(k=8, lists_per_partition=32, near_copy_similarity=0.99)
    found, copies = find_candidates(database.partitions[0], torch.from_numpy(vectors[:10]), wanted)
    assert copies[:5].tolist() == [31] * 5
    assert (copies[5:] <= 1).all()
    stored = database.partitions[0].embeddings[found].astype(np.float32)
    similarities = np.einsum("nkd,nd->nk", stored, vectors[:10])
    assert similarities[found.numpy() >= 0].max() < 0.99 + candidates.ROUNDING


@pytest.mark.parametrize("lists", [1, 5, 32])
def test_visited_lists_are_the_nearest_and_hardly_more(lists: int) -> None:
    similarities = torch.randn(100, 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    nearest, places = candidates._nearest_lists(similarities, lists)
    assert torch.equal(similarities.gather(1, nearest[:, None])[:, 0], similarities.amax(dim=1))
    counts = torch.bincount(places // 8192, minlength=100)
    assert counts.min() >= lists
    assert counts.float().mean() < lists * 1.2 + 1
    least = similarities.topk(lists, dim=1).values[:, -1]
    chosen = torch.zeros_like(similarities, dtype=torch.bool).view(-1).index_fill_(0, places, True)
    assert chosen.view(100, -1)[similarities > least[:, None]].all()


def test_bits_of_numbers_find_what_comparing_numbers_finds() -> None:
    products = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    products[0], products[1, :3] = -products[0].abs(), torch.tensor([0.0, -0.0, -np.inf])
    limits = products.topk(5, dim=1).values[:, -1:]
    limits[2], limits[3] = -0.5, 0.0
    wanted = ((products >= limits) | (limits <= 0)).flatten().nonzero()[:, 0]
    assert torch.equal(candidates._at_least(products, limits), wanted)


@pytest.mark.parametrize("axes", [4, 256])
def test_fewer_axes_choose_other_lists_only_where_they_lose_too_much(
    in_lists: Database, monkeypatch: pytest.MonkeyPatch, axes: int
) -> None:
    queries = clustered(200, seed=8)
    monkeypatch.setattr(candidates, "ROUTED_DIMENSIONS", axes)
    products = queries @ in_lists.partitions[0].embeddings.astype(np.float32).T
    true = np.argsort(-products, axis=1)[:, :8]
    recall = np.mean([np.isin(want, got).mean() for want, got in zip(true, rows(in_lists, queries))])
    assert recall > 0.8 if axes == 256 else recall < 0.6
