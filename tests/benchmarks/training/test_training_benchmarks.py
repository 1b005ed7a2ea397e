"""The benchmarks of training and sampling run at a tiny size and write what they say they write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.report import REPOSITORY
from benchmarks.training import loader, sampling
from benchmarks.training.schedule import PEAK, page, stages
from jobs.cli.recipe import load_recipe
from tests.trainer.tiny_run import write_run


def run(module: str, *words: str) -> None:
    """Run a benchmark in a process of its own, as `make` does."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_first_stage_costs_what_its_operations_say() -> None:
    stage = stages()[0]
    # 216.3 GFLOP were counted by hand from the layers' shapes with another counter
    assert stage.flops == pytest.approx(216.5e9, rel=0.003)
    assert stage.images_per_s(0.5) == pytest.approx(8 * PEAK * 0.5 / stage.flops)
    assert stage.days(0.5) == pytest.approx(275_000 * 1600 / stage.images_per_s(0.5) / 86_400)
    row = {"recipe": stage.name, "parameters": 1, "size": 256, "flops": stage.flops, "batch": 1600}
    row |= {"steps": 275_000, "images": 440_000_000, "images_per_s": [1.0] * 3, "days": [1.0, 2.0, 3.0]}
    assert "1.0 days at 30%, 2.0 days at 40%, 3.0 days at 50%" in page([row])


def test_the_loader_benchmark_measures_both_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["loader", "--tiny", "--scratch", str(tmp_path)])
    loader.main()
    result = json.loads((tmp_path / "loader.json").read_text())
    assert [(case["source"], case["threads"]) for case in result["cases"]] == [
        ("images", 1),
        ("images", 2),
        ("latents", 1),
        ("latents", 2),
    ]
    assert all(case["images_per_core_s"] > 0 and case["waiting_s"] >= 0 for case in result["cases"])
    assert "cores for 3 times the demand" in (tmp_path / "loader.md").read_text()
    made = (tmp_path / "loader-tiny/extent.json").stat().st_mtime_ns
    loader.main()
    assert (tmp_path / "loader-tiny/extent.json").stat().st_mtime_ns == made, "the data are made once"


def test_the_step_benchmark_trains_all_loops_alike(tmp_path: Path) -> None:
    run("step", "--steps", "7", "--scratch", str(tmp_path), "--docs", str(tmp_path))
    result = json.loads((tmp_path / "step.json").read_text())
    assert [one["zero_stage"] for one in result["runs"]] == [0, 1]
    for one in result["runs"]:
        assert one["loss_difference"] < 1e-5
        assert set(one["ms"]) == {"bare", "whole", "ours"}
    assert "Overhead over the bare loop" in (tmp_path / "step.md").read_text()


def test_the_gpu_benchmark_runs_every_case_on_a_cpu(tmp_path: Path) -> None:
    run("gpu", "--tiny", "--scratch", str(tmp_path))
    result = json.loads((tmp_path / "gpu.json").read_text())
    parts = ("matmul", "training", "attention", "sampling", "embedding")
    assert not [found for part in parts for _, found in result[part] if "failed" in found]
    assert {case["checkpointing"] for case, _ in result["training"]} == {True, False}
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("| 32 |") == 2
    assert "Aim: 50% MFU" in text


def test_the_sampling_benchmark_compares_methods_on_the_same_seeds(tmp_path: Path) -> None:
    root, trained = write_run(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\na star\n")
    train = (
        'name = "tiny"\nsource = "latents"\nsize = 32\nk = 4\nglobal_batch = 1\nmicro_batch = 1\nsteps = 1\n'
    )
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'root = "{root.url}"\n[clip]\nmodel = "{trained.clip.model}"\n'
        f'[autoencoder]\nkind = "patch"\npath = "{trained.autoencoder.path}"\n[train]\n{train}'
        f'[evaluate]\nprompts_file = "{prompts}"\nk = 4\nguidance = 2.0\nsamples_per_style = 4\n'
        'device = "cpu"\n'
    )
    methods = [
        sampling.Method("one", "ddim", 4),
        sampling.Method("more", "ddim", 8),
        sampling.Method("other", "ddim", 4, sampling.OTHER_SEEDS),
        sampling.Method("dpm", "dpm++", 4),
    ]
    result = sampling.measure(load_recipe(path), 3, methods)
    found = {row["name"]: row for row in result["methods"]}
    assert found["one"]["distance"] == pytest.approx(0, abs=1e-6)
    assert 0 < found["more"]["distance"] < found["other"]["distance"]
    assert found["dpm"]["distance"] > 0
    assert all(0 <= row["style_accuracy"] <= 1 and row["seconds_per_image"] > 0 for row in found.values())
    assert "| dpm | 0." in sampling.page(result)
