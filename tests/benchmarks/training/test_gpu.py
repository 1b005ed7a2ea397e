"""The GPU benchmark at a tiny size, on a CPU."""

import json
from pathlib import Path

from tests.benchmarks.training.benchmark_process import run_benchmark


def test_the_gpu_benchmark_runs_every_case_on_a_cpu(tmp_path: Path) -> None:
    run_benchmark("gpu", "--tiny", "--scratch", str(tmp_path))
    result = json.loads((tmp_path / "gpu.json").read_text())
    parts = ("matmul", "training", "attention", "sampling", "embedding")
    assert not [values for part in parts for _, values in result[part] if "failed" in values]
    assert {case["checkpointing"] for case, _ in result["training"]} == {True, False}
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("| 32 |") == 2
    assert "Goal: 50% MFU" in text
