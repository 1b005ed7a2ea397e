"""The benchmark of sampling methods on a tiny model."""

from pathlib import Path

import pytest

from benchmarks.training.sampling import OTHER_SEEDS, SamplingMethod, measure, page
from jobs.cli.recipe import load_recipe
from tests.trainer.tiny_run import write_run


def test_methods_are_compared_on_the_same_requests_and_seeds(tmp_path: Path) -> None:
    root, trained = write_run(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\na star\n")
    train = 'name = "tiny"\nsource = "latents"\nsize = 32\nk = 4\nglobal_batch = 1\nmicro_batch = 1\nsteps = 1\n'
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'root = "{root.url}"\n[clip]\nmodel = "{trained.clip.model}"\n'
        f'[autoencoder]\nkind = "patch"\npath = "{trained.autoencoder.path}"\n[train]\n{train}'
        f'[evaluate]\nprompts_file = "{prompts}"\nk = 4\nguidance = 2.0\nsamples_per_style = 4\n'
        'device = "cpu"\n'
    )
    methods = [
        SamplingMethod("reference", "ddim", 4),
        SamplingMethod("more steps", "ddim", 8),
        SamplingMethod("other seeds", "ddim", 4, OTHER_SEEDS),
        SamplingMethod("dpm", "dpm++", 4),
    ]
    result = measure(load_recipe(path), 3, methods)
    rows = {row["name"]: row for row in result["methods"]}
    assert rows["reference"]["distance"] == pytest.approx(0, abs=1e-6)
    assert rows["reference"]["times_as_fast"] == 1
    assert 0 < rows["more steps"]["distance"] < rows["other seeds"]["distance"]
    assert rows["dpm"]["distance"] > 0
    assert all(row["interval"][0] <= row["style_accuracy"] <= row["interval"][1] for row in rows.values())
    assert "| dpm | 0." in page(result)
