from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from trainer.data.sample_order import SHARDS, SampleOrder, rank_slots

ROWS = (10, 0, 7, 25, 3)


@pytest.mark.parametrize("lanes", [1, 4, 7, 64])
def test_every_epoch_has_every_sample_once(lanes: int) -> None:
    order = SampleOrder(ROWS, seed=1, lanes=lanes)
    for epoch in range(3):
        locations = [order.locate(epoch * 45 + offset) for offset in range(45)]
        assert {location.epoch for location in locations} == {epoch}
        counts = Counter((location.shard, location.row) for location in locations)
        assert counts == Counter((shard, row) for shard, rows in enumerate(ROWS) for row in range(rows))


def test_epochs_and_seeds_have_different_orders() -> None:
    def sequence(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = SampleOrder(ROWS, seed=seed, lanes=4)
        locations = [order.locate(epoch * 45 + offset) for offset in range(45)]
        return [(location.shard, location.row) for location in locations]

    assert sequence(1, 0) == sequence(1, 0)
    assert sequence(1, 0) != sequence(1, 1)
    assert sequence(1, 0) != sequence(2, 0)


@pytest.mark.parametrize(("world", "lanes"), [(1, 4), (2, 4), (3, 4), (3, 5), (6, 16)])
def test_ranks_share_a_global_batch_without_gap_or_overlap(world: int, lanes: int) -> None:
    order = SampleOrder(ROWS, seed=1, lanes=lanes)
    for step in range(9):
        shares = [rank_slots(order, step * 12, 12, rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {12 // world}
        assert sorted(np.concatenate(shares)) == list(range(12))


def test_a_rank_reads_only_the_shards_of_its_lanes() -> None:
    # 64 shards of 16 rows in 8 lanes: 8 shards a lane, and each of 4 ranks has 2 lanes.
    order = SampleOrder((16,) * 64, seed=1, lanes=8)
    steps = order.samples_per_epoch // 16
    for rank in range(4):
        slots = [(step * 16 + slot) for step in range(steps) for slot in rank_slots(order, step * 16, 16, rank, 4)]
        assert len({order.locate(int(position)).shard for position in slots}) == 16


@pytest.mark.parametrize(
    ("batch", "lanes", "world", "opened"),
    [(1600, 64, 64, 1), (1536, 64, 128, 1), (1600, 64, 160, 2), (1216, 40, 64, 3)],
)
def test_any_number_of_ranks_keeps_to_few_shards(batch: int, lanes: int, world: int, opened: int) -> None:
    order = SampleOrder((10**6,), seed=1, lanes=lanes)
    for rank in (0, world // 2, world - 1):
        firsts = [step * batch for step in range(40)]
        positions = np.concatenate([first + rank_slots(order, first, batch, rank, world) for first in firsts])
        assert len(set(positions % lanes)) <= opened


def test_a_batch_mixes_as_many_shards_as_there_are_lanes() -> None:
    order = SampleOrder((16,) * 64, seed=1, lanes=8)
    assert len({order.locate(position).shard for position in range(16)}) == 8


def test_orders_of_many_buckets_shuffle_their_shards_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled, make_generator = [], np.random.default_rng

    def counted(seeds: Sequence[int]) -> np.random.Generator:
        if seeds[0] == SHARDS:
            shuffled.append(seeds)
        return make_generator(seeds)

    monkeypatch.setattr(np.random, "default_rng", counted)
    orders = [SampleOrder(ROWS, seed=1, lanes=4) for _ in range(9)]
    for offset in range(20):
        for order in orders:
            order.locate(35 + offset)  # epoch 1 begins at 45
            order.locate(55 - offset)
    assert len(shuffled) == 2 * len(orders)
