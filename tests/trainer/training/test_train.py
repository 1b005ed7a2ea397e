"""Two gloo ranks train a tiny network; runs are killed, terminated, poisoned and resumed."""

import ast
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.trainer.training.launched import outcome, train
from tests.trainer.training_set import NAMES, SHAPE, VIEWS, ids_of, make_recipe, write_latents
from trainer.data.loader import Loader
from trainer.data.plan import is_finished
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.unet import build_unet
from trainer.recipe import Training
from trainer.tracking.progress import read_points
from trainer.training.launch import TERMINATED
from trainer.training.train import checkpoints_of, prepare, run, take_folder

LAUNCH = (
    "import sys; from trainer.training.launch import launch; sys.exit(launch(sys.argv[1:], ranks={ranks}))"
)
STEPS = 20
FOLDER = "runs/tiny/train"


@dataclass
class Launched:
    """A training command on its way."""

    process: subprocess.Popen[str]
    metrics: Path

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has noted a step."""
        deadline = time.monotonic() + 120
        while not any(point.step >= step for point in read_points(self.metrics)):
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def ranks(self) -> list[int]:
        """Process ids of the ranks: children of torchrun, the launcher's child."""
        [torchrun] = children(self.process.pid)
        return children(torchrun)

    def end(self) -> tuple[int, str]:
        """Exit code and log."""
        log = self.process.communicate(timeout=180)[1]
        return self.process.returncode, log


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


Launch = Callable[..., Launched]


@pytest.fixture
def start(rank_modules: None, tmp_path: Path) -> Launch:
    """Starts the training command."""

    def begin(recipe: Training, root: Root, ranks: int = 2) -> Launched:
        path = tmp_path / "recipe.json"
        path.write_text(recipe.model_dump_json())
        command = [sys.executable, "-c", LAUNCH.format(ranks=ranks), "tests.trainer.training.train_rank", str(path), root.url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        return Launched(process, root.local_path(f"runs/{recipe.train.name}/train/metrics.jsonl"))

    return begin


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Root]:
    """Filled by the first test, which later ones compare with and continue."""
    return {}


def recipe_of(autoencoder_folder: str, **changes: object) -> Training:
    return make_recipe(autoencoder_folder, **{"steps": STEPS, "checkpoint_every": 4, **changes})


def trail(root: Root) -> list[tuple[int, float, float, float]]:
    """What resuming must not change, to the bit."""
    points = read_points(root.local_path(f"{FOLDER}/metrics.jsonl"))
    return [(point.step, point.loss, point.grad_norm, point.learning_rate) for point in points]


def test_a_run_ends_with_a_model_that_diffusers_opens(
    training_set: Root, autoencoder_folder: str, start: Launch, finished_run: dict[str, Root]
) -> None:
    recipe = recipe_of(autoencoder_folder)
    code, log = start(recipe, training_set).end()
    assert code == 0, log
    finished_run["root"] = training_set
    manifest = read_manifest(training_set, FOLDER)
    assert set(manifest.checksums()) == {
        f"{FOLDER}/model/config.json",
        f"{FOLDER}/model/diffusion_pytorch_model.safetensors",
        f"{FOLDER}/recipe.json",
    }
    assert manifest.values["images"] == STEPS * 8
    assert manifest.values["latent_shape"] == list(SHAPE)
    assert manifest.values["encoder"] == read_manifest(training_set, "neighbors").values["encoder"]
    unet = UNet2DConditionModel.from_pretrained(training_set.local_path(f"{FOLDER}/model"))
    torch.manual_seed(recipe.train.seed)
    fresh = build_unet(recipe.model)
    moved = [(new - old).abs().max() for new, old in zip(unet.parameters(), fresh.parameters(), strict=True)]
    assert 1e-4 < max(moved) < 0.1


def test_twenty_seeded_steps_give_the_stored_losses(finished_run: dict[str, Root]) -> None:
    losses = [loss for _, loss, *_ in trail(finished_run["root"])]
    assert len(losses) == STEPS
    # Other processors round differently, and twenty steps carry that on.
    for step, loss in {0: 1.04699, 9: 0.52858, 19: 0.29031}.items():
        assert losses[step] == pytest.approx(loss, rel=1e-4 if step == 0 else 1e-2)


def test_a_run_that_was_killed_and_terminated_equals_one_that_never_stopped(
    training_set: Root, autoencoder_folder: str, start: Launch, finished_run: dict[str, Root]
) -> None:
    recipe = recipe_of(autoencoder_folder)
    # The number of steps may be raised on the way.
    killed = start(recipe_of(autoencoder_folder, steps=STEPS - 5), training_set)
    killed.wait_for_step(6)
    ranks = killed.ranks()
    os.kill(ranks[1], signal.SIGKILL)
    since = time.monotonic()
    assert killed.end()[0] != 0
    assert time.monotonic() - since < 30
    assert not any(map(is_alive, ranks))

    terminated = start(recipe, training_set)
    terminated.wait_for_step(11)
    terminated.process.send_signal(signal.SIGTERM)
    code, log = terminated.end()
    assert code == TERMINATED, log
    assert not training_set.exists(f"{FOLDER}/manifest.json")
    stopped_at = trail(training_set)[-1][0]
    assert stopped_at >= 11
    assert training_set.exists(f"{FOLDER}/checkpoints/step-{stopped_at:08d}")

    code, log = start(recipe, training_set).end()
    assert code == 0, log
    assert f"steps {stopped_at} to {STEPS}" in log
    assert trail(training_set) == trail(finished_run["root"])
    ours, theirs = (read_manifest(root, FOLDER) for root in (training_set, finished_run["root"]))
    assert ours.checksums() == theirs.checksums()


def test_a_run_goes_on_with_other_numbers_of_ranks_as_if_it_had_never_stopped(
    training_set: Root, autoencoder_folder: str, finished_run: dict[str, Root]
) -> None:
    # ZeRO may change on the way too.
    for steps, ranks, zero_stage in ((7, 1, 1), (14, 2, 3), (STEPS, 1, 2)):
        train(recipe_of(autoencoder_folder, steps=steps, zero_stage=zero_stage), training_set, ranks)
    mine, wanted = trail(training_set), trail(finished_run["root"])
    # The third number is the gradient's norm, which rounds more.
    np.testing.assert_allclose([one[:2] for one in mine], [one[:2] for one in wanted], rtol=0, atol=1e-5)
    np.testing.assert_allclose(mine, wanted, rtol=1e-3)


def test_a_killed_launcher_takes_its_ranks_along(
    training_set: Root, autoencoder_folder: str, start: Launch
) -> None:
    launched = start(recipe_of(autoencoder_folder, steps=10_000), training_set)
    launched.wait_for_step(1)
    ranks = launched.ranks()
    launched.process.kill()
    launched.process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_alive, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_loss_that_is_not_finite_stops_with_step_rank_and_images(
    training_set: Root, autoencoder_folder: str
) -> None:
    moments = np.full((len(ids_of(2)), VIEWS, 2, *SHAPE), np.inf, np.float16)
    write_latents(training_set, NAMES[2], ids_of(2), moments)
    recipe = recipe_of(autoencoder_folder)
    code, log = outcome(recipe, training_set, ranks=2)
    assert code != 0
    told = re.findall(
        r"step (\d+): loss is (?:nan|inf) on rank (\d).*Images of the step, by rank: (\{.*\})", log
    )
    # Every rank says the same.
    assert set(told) == {told[0]}
    step, rank, ids = (ast.literal_eval(one) for one in told[0])
    assert rank in ids
    plan = prepare(recipe, training_set)
    for bad in ids:
        assert ids[bad] == Loader(plan, training_set, bad, 2).batch(step - 1).image_ids.tolist()
        assert set(ids[bad]) & set(ids_of(2).tolist())
    assert not training_set.exists(f"{FOLDER}/manifest.json")


def test_a_finished_run_returns_at_once(autoencoder_folder: str, finished_run: dict[str, Root]) -> None:
    recipe, root = recipe_of(autoencoder_folder), finished_run["root"]
    assert is_finished(prepare(recipe, root), root)
    # No process group is there to join: it must not get that far.
    run(recipe, root)


def test_a_root_on_an_object_store_is_refused_before_anything_is_read(autoencoder_folder: str) -> None:
    with pytest.raises(UserError, match=r"runs/tiny/train is not on a local disk"):
        prepare(recipe_of(autoencoder_folder, restart=True), Root("memory://nowhere"))


@pytest.fixture
def copied_run(tmp_path: Path, finished_run: dict[str, Root]) -> Root:
    shutil.copytree(finished_run["root"].local_path(""), tmp_path / "copy")
    return Root(tmp_path / "copy")


def test_a_finished_run_whose_model_was_lost_exports_it_again(
    autoencoder_folder: str, copied_run: Root
) -> None:
    before = read_manifest(copied_run, FOLDER).checksums()
    copied_run.delete(f"{FOLDER}/model/diffusion_pytorch_model.safetensors")
    recipe = recipe_of(autoencoder_folder)
    assert not is_finished(prepare(recipe, copied_run), copied_run)
    train(recipe, copied_run, ranks=2)
    assert is_finished(prepare(recipe, copied_run), copied_run)
    assert read_manifest(copied_run, FOLDER).checksums() == before


def test_a_checkpoint_of_another_model_is_refused(autoencoder_folder: str, copied_run: Root) -> None:
    recipe = recipe_of(autoencoder_folder)
    wider = recipe.model.model_copy(update={"channels": (64, 64)})
    with pytest.raises(UserError, match=r"another run: model.channels \[32, 64\] there, \[64, 64\] here"):
        prepare(recipe.model_copy(update={"model": wider}), copied_run)
    with pytest.raises(UserError, match=r"train.learning_rate 0.001 there, 0.1 here.*train.restart"):
        prepare(recipe_of(autoencoder_folder, learning_rate=0.1), copied_run)


def test_a_checkpoint_with_a_damaged_file_is_refused(autoencoder_folder: str, copied_run: Root) -> None:
    checkpoints = checkpoints_of(prepare(recipe_of(autoencoder_folder), copied_run), copied_run)
    damaged = copied_run.local_path(f"{FOLDER}/checkpoints/step-{STEPS:08d}/rank-00001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"rank-00001.safetensors should have .* bytes: the checkpoint is damaged"
    ):
        checkpoints.load(None, None, Ranks(0, 1, torch.device("cpu")))


def test_a_run_starts_from_the_weights_of_another(autoencoder_folder: str, copied_run: Root) -> None:
    stopped = {"name": "second", "start_from": "tiny", "steps": 1, "learning_rate": 1e-30}
    train(recipe_of(autoencoder_folder, **stopped), copied_run)
    first, second = (
        UNet2DConditionModel.from_pretrained(copied_run.local_path(f"runs/{name}/train/model"))
        for name in ("tiny", "second")
    )
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    recipe = recipe_of(autoencoder_folder, **{**stopped, "name": "third"})
    wider = recipe.model.model_copy(update={"channels": (64, 64)})
    with pytest.raises(UserError, match=r"runs/tiny/train trained the model .*train.start_from"):
        prepare(recipe.model_copy(update={"model": wider}), copied_run)


def test_a_restart_deletes_what_another_run_left_and_nothing_of_its_own(
    autoencoder_folder: str, copied_run: Root
) -> None:
    own = recipe_of(autoencoder_folder, restart=True, steps=30)
    os.close(take_folder(prepare(own, copied_run), copied_run))
    assert not copied_run.exists(f"{FOLDER}/manifest.json")
    assert copied_run.exists(f"{FOLDER}/checkpoints/checkpoints.json")
    other = recipe_of(autoencoder_folder, restart=True, learning_rate=0.1)
    os.close(take_folder(prepare(other, copied_run), copied_run))
    assert not copied_run.exists(f"{FOLDER}/checkpoints")
    assert not copied_run.exists(f"{FOLDER}/metrics.jsonl")


def test_fewer_steps_than_a_checkpoint_has_are_refused_or_restarted(
    autoencoder_folder: str, copied_run: Root
) -> None:
    with pytest.raises(UserError, match=r"is at step 20, beyond train.steps 10.*train.restart = true"):
        prepare(recipe_of(autoencoder_folder, steps=10), copied_run)
    fewer = recipe_of(autoencoder_folder, steps=10, restart=True)
    os.close(take_folder(prepare(fewer, copied_run), copied_run))
    assert not copied_run.exists(f"{FOLDER}/checkpoints")


def test_two_trainings_do_not_share_a_folder(autoencoder_folder: str, copied_run: Root) -> None:
    plan = prepare(recipe_of(autoencoder_folder), copied_run)
    with open(copied_run.local_path(f"{FOLDER}/lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being trained by another process"):
            take_folder(plan, copied_run)
