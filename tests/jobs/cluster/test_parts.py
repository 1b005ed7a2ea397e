"""Sampling on several ranks and evaluation on Ray give the files of one process, bit for bit."""

import re
from pathlib import Path

import pytest

from jobs import evaluate, sample
from jobs.cli.recipe import Recipe, load_recipe
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from tests.trainer.tiny_run import PROMPTS, write_run
from tests.trainer.training.launched import fork

SAMPLING = "k = 4\nsteps = 2\nguidance = 2.0\nbatch_size = 2\nworkers = 1\nthreads = 1\ndevice = 'cpu'\n"
TRAIN = 'name = "tiny"\nsource = "latents"\nsize = 32\nk = 4\nglobal_batch = 1\nmicro_batch = 1\nsteps = 1\n'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    root, trained = write_run(folder)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    prompts = f"prompts_file = '{folder / 'prompts.txt'}'\n"
    path = folder / "recipe.toml"
    path.write_text(
        f'root = "{root.url}"\n[clip]\nmodel = "{trained.clip.model}"\n'
        f'[autoencoder]\nkind = "patch"\npath = "{trained.autoencoder.path}"\n[train]\n{TRAIN}'
        f"[sample]\n{prompts}databases = ['green', 'deep_red']\n{SAMPLING}"
        f"[evaluate]\n{prompts}samples_per_style = 4\n{SAMPLING}[evaluate.classifier]\nepochs = 2\n"
    )
    return path


def checksums(recipe: Recipe, stage: str) -> dict[str, str]:
    return read_manifest(recipe.root, f"runs/tiny/{stage}").checksums()


def test_ranks_sample_the_pictures_of_one_process(recipe: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    sample.run(loaded)
    alone = checksums(loaded, "sample")
    loaded.root.delete("runs/tiny/sample")
    code, log = fork(["jobs.sample", str(recipe)], tmp_path / "log", 2)
    assert code == 0, log
    assert checksums(loaded, "sample") == alone
    # 6 pictures in 3 batches: rank 0 draws two, rank 1 one, and nothing is left for rank 0.
    drawn = re.findall(r"sample: (\d+) images", log)
    assert sorted(drawn) == ["0", "2", "4"]
    assert fork(["jobs.sample", str(recipe)], tmp_path / "log", 2)[0] == 0


def test_tasks_on_ray_evaluate_the_pictures_of_one_process(recipe: Path, ray_cluster: None) -> None:
    loaded = load_recipe(recipe)
    evaluate.run(loaded)
    alone = checksums(loaded, "evaluate")
    loaded.root.delete("runs/tiny/evaluate")
    evaluate.run(loaded, ray_tasks=2)
    assert checksums(loaded, "evaluate") == alone


def test_an_error_of_a_task_on_ray_is_the_error_of_the_command(recipe: Path, ray_cluster: None) -> None:
    diverging = load_recipe(recipe, ["sample.guidance=1e38"], remake=True)
    with pytest.raises(UserError, match="left the range of fp32"):
        sample.run(diverging, ray_tasks=1)
