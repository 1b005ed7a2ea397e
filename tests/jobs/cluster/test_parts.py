"""Sampling and evaluation in several processes give the files of one process, bit for bit.

The ranks are tasks on Ray too, so that all tests share two processes that have imported torch.
"""

import io
import logging
import os
import re
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import patch

import pytest
import ray

from jobs import evaluate, sample
from jobs.cli.recipe import Recipe, load_recipe
from jobs.cluster.ray_parts import draw_on_ray
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from tests.jobs.free_ports import free_port
from tests.trainer.tiny_run import PROMPTS, write_run
from trainer.sampling.resumable import Part, draw_alone

SAMPLING = "k = 4\nsteps = 2\nguidance = 2.0\nbatch_size = 2\nworkers = 1\nthreads = 1\ndevice = 'cpu'\n"
STYLES = "['green', 'deep_red']"
TRAIN = 'name = "tiny"\nsource = "latents"\nsize = 32\nk = 4\nglobal_batch = 1\nmicro_batch = 1\nsteps = 1\n'
SCORES = "samples_per_style = 2\nprecision_recall_neighbors = 1\n"

pytestmark = pytest.mark.usefixtures("ray_cluster")


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
        f"[sample]\n{prompts}databases = {STYLES}\n{SAMPLING}"
        f"[evaluate]\n{prompts}styles = {STYLES}\n{SCORES}{SAMPLING}[evaluate.classifier]\nepochs = 2\n"
    )
    return path


def checksums(recipe: Recipe, stage: str) -> dict[str, str]:
    return read_manifest(recipe.root, f"runs/tiny/{stage}").checksums()


def sample_on_ranks(recipe: Path, ranks: int) -> list[str]:
    """Run `laion-rdm sample` on ranks as torchrun starts them, each a task on Ray. Returns their logs."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}

    def run_rank(rank: int) -> str:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with patch.dict(os.environ, shared | own), redirect_stderr(io.StringIO()) as log:
            sample.main([str(recipe)])
        return log.getvalue()

    task = ray.remote(num_cpus=1)(run_rank)
    logs: list[str] = ray.get([task.remote(rank) for rank in range(ranks)], timeout=900)
    return logs


def test_ranks_sample_the_pictures_of_one_process(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    sample.run(loaded)
    alone = checksums(loaded, "sample")
    loaded.root.delete("runs/tiny/sample")
    logs = sample_on_ranks(recipe, 2)
    assert checksums(loaded, "sample") == alone
    # 6 pictures in 3 batches: rank 0 draws two, rank 1 one, and nothing is left for rank 0.
    assert [re.findall(r"sample: (\d+) images", log) for log in logs] == [["4", "0"], ["2"]]
    first, second = sample_on_ranks(recipe, 2)
    assert "is finished" in first
    assert "images" not in second


def test_tasks_on_ray_evaluate_the_pictures_of_one_process(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_recipe(recipe)
    evaluate.run(loaded)
    alone = checksums(loaded, "evaluate")
    loaded.root.delete("runs/tiny/evaluate")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        evaluate.run(loaded, ray_tasks=2)
    assert checksums(loaded, "evaluate") == alone
    assert "evaluate: 2 parts on Ray" in caplog.messages
    # The tasks drew all pictures, so the driver drew none.
    assert re.findall(r"evaluate: (\d+) images", caplog.text) == ["0"]


def test_an_error_of_a_task_on_ray_is_the_error_of_the_command_and_a_defect_has_its_traceback() -> None:
    def refuse(part: Part) -> None:
        raise UserError(f"part {part.number} of {part.count} has no disk")

    def divide(part: Part) -> None:
        print(1 // part.number)

    log = logging.getLogger("sample")
    with pytest.raises(UserError, match=r"^part 0 of 1 has no disk$"):
        draw_on_ray(refuse, 1, log, draw_alone)
    with pytest.raises(ray.exceptions.RayTaskError, match="in divide"):
        draw_on_ray(divide, 1, log, draw_alone)
