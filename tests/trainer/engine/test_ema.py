import os
from pathlib import Path

import pytest
import torch

from tests.trainer.training.launched import fork
from trainer.engine.deepspeed_engine import use_deterministic_algorithms
from trainer.engine.ema import BUCKET, MovingAverage, _buckets, decay_at
from trainer.engine.fragments import Fragment


def test_the_decay_rises_to_its_value() -> None:
    updates = torch.tensor([0, 90, 10**6], dtype=torch.float64)
    assert decay_at(updates, 0.9999).tolist() == pytest.approx([0.1, 0.91, 0.9999])


def test_an_average_moves_towards_its_weights() -> None:
    weights = torch.zeros(3)
    average = MovingAverage([Fragment("w", 0, weights)], decay=0.75)
    weights += 1
    for update, is_update in ((30, True), (30, False), (31, True)):
        average.update(torch.tensor(float(update)), torch.tensor(is_update))
    # From 0 towards 1; each update covers a quarter of the remaining distance.
    assert average.fragments[0].values.tolist() == [1 - 0.75**2] * 3


def test_a_decay_of_almost_one_still_changes_the_average() -> None:
    weights = torch.ones(1)
    average = MovingAverage([Fragment("w", 0, weights)], decay=0.9999)
    weights *= 1.01
    for update in range(10**6, 10**6 + 5000):
        average.update(torch.tensor(float(update)), torch.tensor(True))
    assert average.fragments[0].values.item() == pytest.approx(1 + 0.01 * (1 - 0.9999**5000), abs=5e-5)


def test_averages_are_gathered_in_buckets_of_whole_parameters() -> None:
    shapes = {
        name: torch.Size([elements]) for name, elements in zip("abcd", (BUCKET - 1, 2, BUCKET + 1, 3), strict=True)
    }
    assert list(_buckets(shapes)) == [["a", "b"], ["c"], ["d"]]
    assert list(_buckets({})) == []


def test_deterministic_algorithms_are_required_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_deterministic_algorithms()
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG")


def test_two_ranks_have_exact_masters_and_averages_and_skip_bad_gradients_at_every_zero_stage(tmp_path: Path) -> None:
    code, log = fork(["engine_rank"], tmp_path / "log", ranks=2)
    assert code == 0, log
