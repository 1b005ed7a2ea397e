"""The benchmark of the training loop at a tiny size."""

import json
from pathlib import Path

from tests.trainer.training.launched import fork


def test_all_loops_train_to_the_same_loss(tmp_path: Path) -> None:
    options = ["--steps", "7", "--batch", "2", "--scratch", str(tmp_path), "--docs", str(tmp_path)]
    code, log = fork(["benchmarks.training.step", *options], tmp_path / "log", ranks=1)
    assert code == 0, log
    result = json.loads((tmp_path / "step.json").read_text())
    assert [run["zero_stage"] for run in result["runs"]] == [0, 1]
    for run in result["runs"]:
        assert run["loss_difference"] < 1e-5
        assert set(run["ms"]) == {"bare", "whole", "ours"}
    assert "Overhead over the minimal loop" in (tmp_path / "step.md").read_text()
