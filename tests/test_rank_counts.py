"""The table of ranks in the multi-node guide, against numbers by hand and against what the trainer accepts."""

import json

import pytest

from docs.generate import rank_counts
from jobs.cli.recipe import load_recipe
from trainer.engine.batch_split import nearest_split
from trainer.engine.deepspeed_engine import accumulation_steps
from trainer.recipe import TrainConfig

ROWS = json.loads((rank_counts.REPOSITORY / "docs/training.json").read_text())["recipes"]


@pytest.mark.parametrize(
    ("ranks", "sent", "with_reduce_scatter"),
    # A billion weights of 2 bytes: 2 GB. Of three passes a rank keeps its own part: 1, 1/2 or 1/4 of each.
    [(1, 0.0, 0.0), (2, 3.0, 2.0), (4, 4.5, 3.0)],
)
def test_a_rank_sends_the_bytes_of_a_ring(ranks: int, sent: float, with_reduce_scatter: float) -> None:
    assert rank_counts.sent_bytes(10**9, ranks) / 1e9 == sent
    assert rank_counts.sent_bytes(10**9, ranks, rank_counts.REDUCE_SCATTER) / 1e9 == with_reduce_scatter


@pytest.mark.parametrize(
    ("batch", "micro_batch", "ranks", "text"),
    [
        (1600, 200, 1, "200 x 8"),
        (1600, 200, 16, "100 x 1"),
        (1600, 200, 128, "**1,536**: 12 x 1"),  # 12.5 a rank: 1,536 and 1,664 are equally near
        (432, 54, 32, "**416**: 13 x 1"),  # 13.5 a rank
        (432, 54, 256, "**512**: 2 x 1"),  # 80 more, 176 fewer
        (10, 4, 16, "**16**: 1 x 1"),  # at least one sample a rank
        (300, 64, 2, "50 x 3"),  # 150 a rank: the largest divisor up to 64
    ],
)
def test_a_division_is_the_nearest_one(batch: int, micro_batch: int, ranks: int, text: str) -> None:
    assert rank_counts.division({"global_batch": batch, "micro_batch": micro_batch}, ranks) == text


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["recipe"])
def test_the_trainer_accepts_every_division_of_the_table(row: dict[str, str]) -> None:
    train = load_recipe(rank_counts.REPOSITORY / f"jobs/configs/{row['recipe']}.toml")[TrainConfig]
    for ranks in (*rank_counts.RANKS, *rank_counts.whole_machines(train.global_batch)):
        split = nearest_split(train.global_batch, train.micro_batch, ranks)
        changed = TrainConfig.model_validate(
            train.model_dump() | {"global_batch": split.global_batch, "micro_batch": split.micro_batch}
        )
        assert accumulation_steps(changed, ranks) == split.accumulation
    assert all(row["batch"] % ranks == 0 for ranks in rank_counts.whole_machines(train.global_batch))
