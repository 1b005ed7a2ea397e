"""Candidates of a join: independent of block sizes, and none of the best rows is missing."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retrieval import Database
from retrieval.index.partition import Partition
from retrieval.index.routing import Vectors
from retrieval.join import candidates
from retrieval.join.candidates import CandidateSettings, SearchedRows, find_candidates
from retrieval.join.device_rows import DeviceRows
from tests.retrieval.conftest import clustered, share_found

SETTINGS = CandidateSettings(k=8, lists_per_partition=16, near_copy_similarity=2.0)


def searched(partition: Partition) -> SearchedRows:
    return DeviceRows(partition, torch.device("cpu")), partition.lists


def candidate_rows(database: Database, queries: Vectors) -> list[list[int]]:
    candidates, _ = find_candidates(searched(database.partitions[0]), torch.from_numpy(queries), SETTINGS)
    return candidates.sort().values.tolist()


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
def test_candidates_do_not_depend_on_block_sizes(
    in_lists: Database, queries: Vectors, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]
) -> None:
    unlimited = candidate_rows(in_lists, queries)
    for name, value in limits.items():
        monkeypatch.setattr(candidates, name, value)
    assert candidate_rows(in_lists, queries) == unlimited


def test_no_row_of_the_visited_lists_beats_a_candidate_by_more_than_rounding(in_lists: Database) -> None:
    queries = clustered(200, seed=7)
    partition = in_lists.partitions[0]
    products = queries @ partition.embeddings.astype(np.float32).T
    everything = CandidateSettings(k=8, lists_per_partition=len(partition.lists[1]), near_copy_similarity=2.0)
    rows_to_rank, _ = find_candidates(searched(partition), torch.from_numpy(queries), everything)
    best = -np.sort(-products, axis=1)[:, :8]
    chosen = -np.sort(-np.take_along_axis(products, rows_to_rank.numpy(), 1), axis=1)[:, :8]
    assert (best - chosen).max() < 2 * candidates.ROUNDING
    assert (best == chosen).mean() > 0.99


def test_rows_that_are_certainly_near_copies_are_counted_instead(build: Callable[..., Database]) -> None:
    vectors = clustered(2000, seed=3)
    copied = np.concatenate([vectors, np.repeat(vectors[:5], 30, axis=0)])
    database = build(copied, flat_rows=1000)
    settings = CandidateSettings(k=8, lists_per_partition=32, near_copy_similarity=0.99)
    rows_to_rank, copies = find_candidates(searched(database.partitions[0]), torch.from_numpy(vectors[:10]), settings)
    assert copies[:5].tolist() == [31] * 5
    assert (copies[5:] <= 1).all()
    stored = database.partitions[0].embeddings[rows_to_rank].astype(np.float32)
    similarities = np.einsum("nkd,nd->nk", stored, vectors[:10])
    assert similarities[rows_to_rank.numpy() >= 0].max() < 0.99 + candidates.ROUNDING


@pytest.mark.parametrize("lists", [1, 5, 32])
def test_visited_lists_are_the_nearest_and_few_others(lists: int) -> None:
    similarities = torch.randn(100, 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    nearest, places = candidates._nearest_lists(similarities, lists)
    assert torch.equal(similarities.gather(1, nearest[:, None])[:, 0], similarities.amax(dim=1))
    counts = torch.bincount(places // 8192, minlength=100)
    assert counts.min() >= lists
    assert counts.float().mean() < lists * 1.2 + 1
    least = similarities.topk(lists, dim=1).values[:, -1]
    chosen = torch.zeros_like(similarities, dtype=torch.bool).view(-1).index_fill_(0, places, True)
    assert chosen.view(100, -1)[similarities > least[:, None]].all()


def test_comparing_bits_equals_comparing_numbers() -> None:
    products = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    products[0], products[1, :3] = -products[0].abs(), torch.tensor([0.0, -0.0, -np.inf])
    limits = products.topk(5, dim=1).values[:, -1:]
    limits[2], limits[3] = -0.5, 0.0
    expected = ((products >= limits) | (limits <= 0)).flatten().nonzero()[:, 0]
    assert torch.equal(candidates._at_least(products, limits), expected)


@pytest.mark.parametrize("axes", [4, 256])
def test_recall_is_high_with_all_axes_and_low_with_four(
    in_lists: Database, monkeypatch: pytest.MonkeyPatch, axes: int
) -> None:
    queries = clustered(200, seed=8)
    monkeypatch.setattr(candidates, "ROUTED_DIMENSIONS", axes)
    products = queries @ in_lists.partitions[0].embeddings.astype(np.float32).T
    true = np.argsort(-products, axis=1)[:, :8]
    recall = share_found(true, candidate_rows(in_lists, queries))
    assert recall > 0.8 if axes == 256 else recall < 0.6


@pytest.fixture
def gpu_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU takes the steps that a GPU takes."""
    search = candidates._CandidateSearch
    monkeypatch.setattr(search, "_pairs_above", search._best_pairs)


@pytest.mark.parametrize("limits", [{}, {"ROWS_AT_ONCE": 32, "PRODUCTS_AT_ONCE": 32, "PAIRS_AT_ONCE": 50}])
@pytest.mark.parametrize("copies", [2.0, 0.9])
def test_the_steps_of_a_gpu_give_the_same_candidates_and_copies(
    in_lists: Database,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, int],
    copies: float,
) -> None:
    partition = in_lists.without(np.arange(1000, 1200)).partitions[0]
    queries = torch.from_numpy(np.concatenate([clustered(60, seed=7), clustered(3000, seed=1)[200:220]]))
    settings = CandidateSettings(k=8, lists_per_partition=16, near_copy_similarity=copies)
    expected = find_candidates(searched(partition), queries, settings)
    assert expected[1].any() == (copies == 0.9)
    request.getfixturevalue("gpu_steps")
    for name, value in limits.items():
        monkeypatch.setattr(candidates, name, value)
    rows, near_copies = find_candidates(searched(partition), queries, settings)
    assert torch.equal(rows.sort().values, expected[0].sort().values)
    assert torch.equal(near_copies, expected[1])


class Waits(TorchDispatchMode):
    """Counts the operations for which a program waits on a GPU: their result has a size or a number from the data."""

    NAMES = ("nonzero", "bincount", "masked_select", "_local_scalar_dense", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        takes_mask = func.overloadpacket.__name__ == "index" and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        self.count += takes_mask or any(name in func.overloadpacket.__name__ for name in self.NAMES)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("gpu_steps")
def test_the_steps_of_a_gpu_wait_as_often_for_many_lists_as_for_few(in_lists: Database) -> None:
    rows = searched(in_lists.partitions[0])
    counts = []
    for lists in (2, 64):
        settings = CandidateSettings(k=8, lists_per_partition=lists, near_copy_similarity=2.0)
        with Waits() as waits:
            find_candidates(rows, torch.from_numpy(clustered(200, seed=7)), settings)
        counts.append(waits.count)
    assert 0 < counts[0] == counts[1] < 12
