"""Every way to launch a training run gives the same model, bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ray
from ray import cloudpickle

from jobs.cli.recipe import load_recipe
from jobs.cluster import ray_training
from jobs.cluster.ray_training import train_on_ray
from jobs.train import parse_arguments, run
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.fork_server import torchrun_client
from tests.jobs.free_ports import free_port
from tests.trainer.training.launched import train
from tests.trainer.training.machines import replace_programs
from tests.trainer.training_set import make_recipe, write_training_set
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import TrainingRecipe
from trainer.training import loop

FOLDER = "runs/tiny/train"
REPOSITORY = Path(__file__).parents[3]
RANKS = 2


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, an autoencoder and a recipe, before any training."""
    folder = tmp_path_factory.mktemp("launching")
    autoencoder = write_autoencoder(folder / "autoencoder")
    recipe = make_recipe(autoencoder, steps=8, checkpoint_every=2, ranks=RANKS)
    write_training_set(Root(folder), Autoencoder.load(recipe.autoencoder, "cpu").identity)
    write_recipe(folder, recipe)
    return folder


def write_autoencoder(folder: Path) -> str:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "norm_num_groups": 4}
    AutoencoderKL(layers_per_block=1, **blocks, **widths).save_pretrained(folder)
    return str(folder)


def write_recipe(folder: Path, recipe: TrainingRecipe) -> None:
    lines = [f"root = {json.dumps(str(folder))}"]
    for section, values in recipe.model_dump(mode="json", exclude_defaults=True).items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / "recipe.toml").write_text("\n".join(lines))


@pytest.fixture
def copy(training_set: Path, tmp_path: Path) -> Path:
    """A copy of the data and the recipe in another folder."""
    folder = tmp_path / "copy"
    shutil.copytree(training_set, folder, ignore=shutil.ignore_patterns("runs"))
    text = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(text.replace(f'root = "{training_set}"', f'root = "{folder}"'))
    return folder


@pytest.fixture(scope="module")
def expected(training_set: Path) -> dict[str, str]:
    """Checksums of the model trained without a launcher."""
    recipe = load_recipe(training_set / "recipe.toml")
    train(training_of(recipe.sections), recipe.root, RANKS)
    return read_manifest(recipe.root, FOLDER).checksums()


def command(*words: str, code: int = 0, **environment: str) -> str:
    """Run Python with these arguments. Returns the lines of stderr that are a UserError.

    It is a new interpreter: in a fork of `forked_python`, an import that a command lacks may go unnoticed.
    """
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return "".join(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_deepspeeds_launcher_on_the_machines_of_a_hostfile_without_ray(
    copy: Path, tmp_path: Path, expected: dict[str, str], forked_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_programs(tmp_path, monkeypatch, "ssh", "pdsh")
    # The command and the rank of the first machine have new interpreters, which show missing imports. DeepSpeed's
    # launchers and the other rank are forks.
    monkeypatch.setenv("PYTHON_EXEC", str(forked_python))
    program = Path(__file__).with_name("forked_children.py")
    monkeypatch.setenv("FIRST", f"s#{sys.executable} -u -m#{forked_python} -m#")
    monkeypatch.setenv("OTHERS", f"s#{sys.executable} -u -m#{forked_python} {program} -m#")
    (tmp_path / "hosts.txt").write_text("first slots=1\nsecond slots=1\n")
    words = [str(program), "-m", "jobs.train", str(copy / "recipe.toml"), "--hosts", str(tmp_path / "hosts.txt")]
    (tmp_path / "without_ray").mkdir()
    (tmp_path / "without_ray/ray.py").write_text("raise ImportError('Ray is not installed')")
    path = f"{tmp_path / 'without_ray'}:{REPOSITORY}"
    assert command(*words, MASTER_PORT=str(free_port()), PYTHONPATH=path) == ""
    assert read_manifest(Root(copy), FOLDER).checksums() == expected


def test_torchrun_on_two_nodes_restarts_after_a_kill(
    copy: Path, tmp_path: Path, expected: dict[str, str], forked_python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON_EXEC", str(forked_python))  # with which torchrun starts ranks
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launcher = [str(torchrun_client()), "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--max-restarts=1"]
    launcher += ["--rdzv-conf=keep_alive_max_attempt=60"]  # a busy machine delays the signs of life of a node
    module = ["-m", "killed_once", str(copy / "recipe.toml")]
    with (tmp_path / "log").open("w") as log:
        nodes = [subprocess.Popen([*launcher, *module], stderr=log) for _ in range(2)]
    assert [node.wait(timeout=900) for node in nodes] == [0, 0], (tmp_path / "log").read_text()
    first, second = re.findall(r"  steps (\d) to 8", (tmp_path / "log").read_text())
    assert first == "0"
    assert second in ("2", "4"), "the last checkpoint before the kill"
    assert read_manifest(Root(copy), FOLDER).checksums() == expected


def killed_rank(run_rank: Callable[..., None], config: TrainingRecipe, root: Root, folder: str) -> None:
    """A rank on Ray, of which the first one is killed as in killed_once.py. Ray counts the parameters."""
    set_learning_rate, steps = loop.set_learning_rate, list[int]()

    def killed(engine: Any, config: Any, step: int) -> float:
        steps.append(step)
        if (steps[0], step, ray.train.get_context().get_world_rank()) == (0, 5, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return set_learning_rate(engine, config, step)

    with patch.object(loop, "set_learning_rate", killed):
        run_rank(config, root, folder)


def test_ray_workers_of_which_one_is_killed(
    copy: Path,
    expected: dict[str, str],
    ray_cluster: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test file
    monkeypatch.setattr(ray_training, "_run_rank", partial(killed_rank, ray_training._run_rank))
    recipe = load_recipe(copy / "recipe.toml")
    train_on_ray(training_of(recipe.sections), recipe.root)
    # The last or the last but one checkpoint before the kill.
    assert re.search(r"restarting from step [24]: a worker was lost", caplog.text)
    assert read_manifest(Root(copy), FOLDER).checksums() == expected


def training_of(sections: dict[str, object]) -> TrainingRecipe:
    names = ("model", "diffusion", "autoencoder", "train")
    return TrainingRecipe(**{name: sections[name] for name in names})


def test_a_training_that_cannot_run_is_refused_before_any_rank_starts(
    training_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_programs(tmp_path, monkeypatch, "ssh", "pdsh")
    recipe, hosts = load_recipe(training_set / "recipe.toml", ["train.name=other"]), tmp_path / "hosts.txt"
    hosts.write_text("good slots=1\ndead slots=1\n")
    with pytest.raises(UserError, match="host dead does not answer"):
        run(recipe, hosts)
    hosts.write_text("good slots=2\nbad slots=1\n")
    with pytest.raises(UserError, match="global_batch 8 cannot be split over 3 ranks"):
        run(recipe, hosts)
    huge = load_recipe(training_set / "recipe.toml", ["train.name=other", "train.keep_checkpoints=10000000000"])
    with pytest.raises(UserError, match=r"checkpoints of 0.02 GB and the model need .* GB are free. Free disk space"):
        run(load_recipe(huge.path, [*huge.overrides, "train.steps=10000000000"]))


def test_the_argument_that_deepspeed_adds_is_accepted() -> None:
    arguments = parse_arguments(["--local_rank=1", "recipe.toml", "--set", "train.steps=1"])
    assert (arguments.recipe, arguments.ray) == (Path("recipe.toml"), False)
    assert arguments.overrides == ["train.steps=1"]
