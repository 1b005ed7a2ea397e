"""The benchmark of the training loop at a tiny size, and the waits for a GPU in an interval of the log."""

import json
from typing import Any

import pytest

from benchmarks.training.step import WARM_UP_STEPS
from tests.trainer.training.launched import fork


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report after a call on one rank and one on two."""
    folder = tmp_path_factory.mktemp("step")
    options = ["--steps", "7", "--batch", "4", "--scratch", str(folder), "--docs", str(folder)]
    for ranks in (1, 2):
        code, log = fork(["benchmarks.training.step", *options], folder / "log", ranks)
        assert code == 0, log
    return {**json.loads((folder / "step.json").read_text()), "page": (folder / "step.md").read_text()}


def test_all_loops_train_to_the_same_loss_on_one_rank_and_on_two(result: dict[str, Any]) -> None:
    assert [(run["zero_stage"], run["ranks"]) for run in result["runs"]] == [(0, 1), (1, 2)]
    for run in result["runs"]:
        assert run["loss_difference"] < 1e-5
        assert set(run["ms"]) == {"bare", "whole", "ours"}
    assert "Overhead over the minimal loop" in result["page"]


def test_an_interval_of_the_log_waits_for_the_gpu_once(result: dict[str, Any]) -> None:
    assert [run["waits"] * WARM_UP_STEPS for run in result["runs"]] == [1, 1]
    assert "A step of our loop waits\n0.2 times for a GPU, by a stand-in" in result["page"]
