"""Training of a tiny network on two gloo ranks: killed, terminated and resumed runs, and refused inputs."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.crashes.store import Store
from retrieval.errors import UserError
from retrieval.storage.lease import lease
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.fork_server import torchrun_client
from tests.trainer.training.launched import fork, start_ranks, train, try_to_train
from tests.trainer.training_set import SHAPE, make_recipe, new_training_set, write_training_set
from trainer.data.plan import is_finished
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.autoencoder import Autoencoder
from trainer.model.unet import build_unet
from trainer.recipe import TrainingRecipe
from trainer.tracking.training_log import read_step_metrics
from trainer.training.launch import TERMINATED
from trainer.training.train import checkpoints_of, clear_folder, prepare, run

LAUNCH = "import sys; from trainer.training.launch import launch; sys.executable = sys.argv[1];"
LAUNCH += "sys.exit(launch(sys.argv[2:], ranks=2))"
STEPS = 20
FOLDER = "runs/tiny/train"


def wait_for(condition: Callable[[], bool], is_running: Callable[[], bool]) -> None:
    """Wait until the condition holds, while a process runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert is_running()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_step(root: Root, step: int) -> bool:
    """Whether the run has recorded a step."""
    return any(metrics.step >= step for metrics in read_step_metrics(root.local_path(f"{FOLDER}/metrics.jsonl")))


def is_alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def write_recipe(recipe: TrainingRecipe, root: Root) -> list[str]:
    """Write a recipe. Returns the arguments of a rank that trains with it."""
    path = root.local_path("recipe.json")
    path.write_text(recipe.model_dump_json())
    return ["train_rank", str(path), root.url]


def launch(*argv: str) -> subprocess.Popen[str]:
    """Launch `python -m <argv>` in two ranks. The launcher and torchrun are forks."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    python = str(torchrun_client())
    command = [python, "-c", LAUNCH, python, *argv]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def waiting_ranks(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher and the process ids of its two ranks, which only wait: they start at once and import no torch."""
    launcher = launch("waiting_rank", str(tmp_path))
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, lambda: launcher.poll() is None)
    return launcher, [int(path.name) for path in tmp_path.iterdir()]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: str) -> Root:
    """An uninterrupted run on two ranks. Tests compare with it and change only copies of it."""
    root = new_training_set(tmp_path_factory.mktemp("finished"), autoencoder_folder)
    train(recipe_of(autoencoder_folder), root, ranks=2)
    return root


def recipe_of(autoencoder_folder: str, **changes: object) -> TrainingRecipe:
    return make_recipe(autoencoder_folder, **{"steps": STEPS, "checkpoint_every": 4, "micro_batch": 4, **changes})


def history(root: Root) -> list[tuple[int, float, float, float]]:
    """Step, loss, gradient norm and learning rate of all steps: resuming must not change a bit of them."""
    with root.local(f"{FOLDER}/metrics.jsonl") as path:
        entries = read_step_metrics(path)
    return [(entry.step, entry.loss, entry.grad_norm, entry.learning_rate) for entry in entries]


def test_a_finished_run_has_a_model_that_diffusers_loads(finished_run: Root, autoencoder_folder: str) -> None:
    recipe = recipe_of(autoencoder_folder)
    manifest = read_manifest(finished_run, FOLDER)
    files = ("model/config.json", "model/diffusion_pytorch_model.safetensors", "recipe.json")
    assert set(manifest.checksums()) == {f"{FOLDER}/{name}" for name in files}
    assert manifest.values["images"] == STEPS * 8
    assert manifest.values["latent_shape"] == list(SHAPE)
    assert manifest.values["encoder"] == read_manifest(finished_run, "neighbors").values["encoder"]
    unet = UNet2DConditionModel.from_pretrained(finished_run.local_path(f"{FOLDER}/model"))
    torch.manual_seed(recipe.train.seed)
    initial = build_unet(recipe.model)
    pairs = zip(unet.parameters(), initial.parameters(), strict=True)
    assert 1e-4 < max((trained - untrained).abs().max() for trained, untrained in pairs) < 0.1


def test_twenty_seeded_steps_give_the_stored_losses(finished_run: Root) -> None:
    losses = [loss for _, loss, *_ in history(finished_run)]
    assert len(losses) == STEPS
    # Rounding differs between processors, and the difference grows over twenty steps.
    for step, loss in {0: 1.04699, 9: 0.52858, 19: 0.29031}.items():
        assert losses[step] == pytest.approx(loss, rel=1e-4 if step == 0 else 1e-2)


def test_a_killed_and_terminated_run_equals_an_uninterrupted_run(
    training_set: Root,
    autoencoder_folder: str,
    finished_run: Root,
    forked_python: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHON_EXEC", str(forked_python))  # with which torchrun starts ranks
    recipe = recipe_of(autoencoder_folder)
    # The number of steps may be raised when a run is resumed.
    argv = write_recipe(recipe_of(autoencoder_folder, steps=STEPS - 5), training_set)
    ranks = start_ranks(["held_rank", "7", *argv], training_set.local_path("log"), ranks=2)
    wait_for(lambda: has_step(training_set, 6), lambda: ranks[0].poll() is None)
    ranks[1].kill()
    ranks[0].terminate()  # as torchrun does
    assert ranks[0].wait(timeout=300) != 0

    # It logs no step before its end, and reads the numbers of a step two steps later.
    seldom = recipe_of(autoencoder_folder, log_every=1000)
    checkpoints = checkpoints_of(prepare(recipe, training_set), training_set)
    killed_at = checkpoints.newest_step()
    terminated = launch("held_rank", "10", *write_recipe(seldom, training_set))
    wait_for(lambda: checkpoints.newest_step() > killed_at, lambda: terminated.poll() is None)
    terminated.send_signal(signal.SIGTERM)
    log = terminated.communicate(timeout=300)[1]
    assert terminated.returncode == TERMINATED, log
    assert not training_set.exists(f"{FOLDER}/manifest.json")
    stopped_at = history(training_set)[-1][0]
    assert stopped_at > killed_at
    assert training_set.exists(f"{FOLDER}/checkpoints/step-{stopped_at:08d}")

    log = train(recipe, training_set, ranks=2)
    assert f"steps {stopped_at} to {STEPS}" in log
    every_step = history(finished_run)
    assert history(training_set) == [every_step[step - 1] for step, *_ in history(training_set)]
    assert read_manifest(training_set, FOLDER).checksums() == read_manifest(finished_run, FOLDER).checksums()


def test_a_run_resumed_on_other_numbers_of_ranks_equals_an_uninterrupted_run(
    training_set: Root, autoencoder_folder: str, finished_run: Root
) -> None:
    # The ZeRO stage may change as well.
    for steps, ranks, zero_stage in ((7, 1, 1), (14, 2, 3), (STEPS, 1, 2)):
        train(recipe_of(autoencoder_folder, steps=steps, zero_stage=zero_stage), training_set, ranks)
    resumed, expected = np.array(history(training_set)), np.array(history(finished_run))
    np.testing.assert_allclose(resumed[:, :2], expected[:, :2], rtol=0, atol=1e-5)
    # The gradient norm has larger rounding errors than step and loss.
    np.testing.assert_allclose(resumed, expected, rtol=1e-3)


def test_the_other_ranks_end_when_one_is_killed(waiting_ranks: tuple[subprocess.Popen[str], list[int]]) -> None:
    launcher, ranks = waiting_ranks
    os.kill(ranks[1], signal.SIGKILL)
    launcher.communicate(timeout=300)
    assert launcher.returncode != 0
    assert not any(map(is_alive, ranks))


def test_ranks_end_when_their_launcher_is_killed(waiting_ranks: tuple[subprocess.Popen[str], list[int]]) -> None:
    launcher, ranks = waiting_ranks
    launcher.kill()
    launcher.wait(timeout=300)
    wait_for(lambda: not any(map(is_alive, ranks)), lambda: True)


def test_ranks_end_with_their_parent_and_get_the_recipes_timeout(
    training_set: Root, autoencoder_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def join_ranks(timeout_minutes: int) -> Ranks:
        raise RuntimeError(f"{timeout_minutes} minutes after {calls}")

    monkeypatch.setattr("trainer.training.train.join_ranks", join_ranks)
    monkeypatch.setattr("trainer.training.train.Termination", object)
    monkeypatch.setattr("trainer.training.train.die_with_parent", lambda: calls.append("die_with_parent"))
    with pytest.raises(RuntimeError, match=r"7 minutes after \['die_with_parent'\]"):
        run(recipe_of(autoencoder_folder, timeout_minutes=7), training_set)


def test_the_papers_combination_trains_like_fp32_and_its_settings_may_change_on_resuming(
    training_set: Root, autoencoder_folder: str, finished_run: Root
) -> None:
    """bf16, ZeRO 1, contiguous gradients and two micro batches on two ranks; then one rank with another batch."""
    changes = {"precision": "bf16", "zero_stage": 1, "activation_checkpointing": True, "deterministic": True}
    changes |= {"micro_batch": 2}
    train(recipe_of(autoencoder_folder, **changes, steps=6, profile_steps=1), training_set, ranks=2)
    [trace] = training_set.local_path(f"{FOLDER}/profile").iterdir()
    assert trace.name == "00000006-00000006.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("addmm" in event.get("name", "") for event in events)
    expected, losses = (np.array(history(root))[:6, 1] for root in (finished_run, training_set))
    np.testing.assert_allclose(losses, expected, rtol=2e-2)
    assert (losses != expected).all()
    changes |= {"global_batch": 4, "learning_rate": 5e-4, "max_grad_norm": 0.5, "ema_decay": 0.5}
    changes |= {"learning_rate_decay": "linear", "adam_beta2": 0.9, "decay_norms_and_biases": False}
    log = train(recipe_of(autoencoder_folder, **changes, steps=8), training_set)
    assert "train.global_batch was 8, is now 4; train.learning_rate was 0.001, is now 0.0005" in log
    entries = read_step_metrics(training_set.local_path(f"{FOLDER}/metrics.jsonl"))
    recorded = [(entry.images, entry.global_batch, entry.ema_decay, entry.adam_beta2) for entry in entries[5:7]]
    assert recorded == [(48, 8, 0.9, 0.999), (52, 4, 0.5, 0.9)]
    # Of 8 steps, 2 of them warm-up: 2 and 1 sixths of the rate are left at steps 6 and 7.
    assert [entry.learning_rate for entry in entries[5:]] == pytest.approx([1e-3, 5e-4 * 2 / 6, 5e-4 / 6])
    assert read_manifest(training_set, FOLDER).values["images"] == 56


def test_a_finished_run_is_not_trained_again(autoencoder_folder: str, finished_run: Root) -> None:
    before = read_manifest(finished_run, FOLDER)
    log = train(recipe_of(autoencoder_folder), finished_run, ranks=2)
    assert f"{FOLDER} is finished" in log
    assert "steps" not in log
    assert read_manifest(finished_run, FOLDER) == before


def test_settings_that_one_rank_refuses_are_an_error_of_all(
    training_set: Root, finished_run: Root, autoencoder_folder: str
) -> None:
    """Of a rank of a new run, and of a rank of a run that rank 0 has finished."""
    other = training_set.local_path("other.json")
    other.write_text(recipe_of(autoencoder_folder, k=3, timeout_minutes=10).model_dump_json())
    for root in (training_set, finished_run):
        argv = [*write_recipe(recipe_of(autoencoder_folder, timeout_minutes=10), root), str(other)]
        code, log = fork(argv, training_set.local_path("log"), ranks=2)
        assert code != 0
        prefixes = re.findall(r"error: (rank 1: )?.*neighbors has k 4, but the recipe has 3", log)
        assert sorted(prefixes) == ["", "rank 1: "], log
        assert "Traceback" not in log


def test_a_run_in_a_bucket_that_goes_on_on_another_machine_equals_a_run_on_a_disk(
    autoencoder_folder: str, finished_run: Root, object_store: Store, tmp_path: Path
) -> None:
    root, log = Root(object_store.url("run")), tmp_path / "log"
    write_training_set(root, Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu").identity)
    checkpoints = checkpoints_of(prepare(recipe_of(autoencoder_folder), root), root)
    for number, last_step in enumerate((4, STEPS)):
        # Each machine has its own cache, which is smaller than the data.
        changes = {"cache_folder": str(tmp_path / f"machine-{number}"), "cache_gb": 190e-6}
        path = tmp_path / f"{number}.json"
        path.write_text(recipe_of(autoencoder_folder, **changes).model_dump_json())
        held = str(last_step + 1)
        processes = start_ranks(["held_rank", held, "train_rank", str(path), root.url], log, ranks=2)
        while checkpoints.newest_step() < last_step:
            assert all(process.poll() in (None, 0) for process in processes), log.read_text()
            time.sleep(0.05)
        if last_step < STEPS:
            for process in processes:
                process.kill()
        for process in processes:
            process.wait(timeout=300)
    assert f"steps 4 to {STEPS}" in log.read_text()
    assert history(root) == history(finished_run)
    assert read_manifest(root, FOLDER).checksums() == read_manifest(finished_run, FOLDER).checksums()
    names = {name.removeprefix(f"{FOLDER}/").split("/")[0] for name in root.list(FOLDER)}
    files = {"manifest.json", "metrics.jsonl", "recipe.json", "validation.jsonl", "kid.jsonl"}
    assert names == files | {"checkpoints", "model", "tensorboard"}
    # The older checkpoints and the lease are deleted.
    assert len(root.list(f"{FOLDER}/checkpoints")) == 1 + 2 * 2
    assert not root.list("leases")


@pytest.fixture
def copied_run(tmp_path: Path, finished_run: Root) -> Root:
    shutil.copytree(finished_run.local_path(""), tmp_path / "copy")
    return Root(tmp_path / "copy")


def test_a_finished_run_with_a_deleted_model_exports_it_again(autoencoder_folder: str, copied_run: Root) -> None:
    before = read_manifest(copied_run, FOLDER).checksums()
    copied_run.delete(f"{FOLDER}/model/diffusion_pytorch_model.safetensors")
    recipe = recipe_of(autoencoder_folder)
    assert not is_finished(prepare(recipe, copied_run), copied_run)
    train(recipe, copied_run, ranks=2)
    assert is_finished(prepare(recipe, copied_run), copied_run)
    assert read_manifest(copied_run, FOLDER).checksums() == before


def test_a_checkpoint_of_another_recipe_is_an_error(autoencoder_folder: str, copied_run: Root) -> None:
    recipe = recipe_of(autoencoder_folder)
    wider = recipe.model.model_copy(update={"channels": (64, 64)})
    with pytest.raises(UserError, match=r"another run: model.channels was \[32, 64\], is now \[64, 64\]"):
        prepare(recipe.model_copy(update={"model": wider}), copied_run)
    with pytest.raises(UserError, match=r"train.p_uncond was 0.1, is now 0.2.*train.restart"):
        prepare(recipe_of(autoencoder_folder, p_uncond=0.2), copied_run)
    with pytest.raises(UserError, match=r"last step 20, and.*train.learning_rate was 0.001, is now 0.1.*train.restart"):
        prepare(recipe_of(autoencoder_folder, learning_rate=0.1), copied_run)
    prepare(recipe_of(autoencoder_folder, learning_rate=0.1, steps=21), copied_run)


def test_a_damaged_checkpoint_file_is_an_error(autoencoder_folder: str, copied_run: Root) -> None:
    checkpoints = checkpoints_of(prepare(recipe_of(autoencoder_folder), copied_run), copied_run)
    damaged = copied_run.local_path(f"{FOLDER}/checkpoints/step-{STEPS:08d}/rank-00001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=r"rank-00001.safetensors should have .* has 100: the checkpoint is damaged"):
        checkpoints.load(None, None, Ranks(0, 1, torch.device("cpu")))


def test_a_run_can_start_from_the_weights_of_another_run(autoencoder_folder: str, copied_run: Root) -> None:
    changes = {"name": "second", "start_from": "tiny", "steps": 1, "learning_rate": 1e-30}
    train(recipe_of(autoencoder_folder, **changes), copied_run)
    first, second = (
        UNet2DConditionModel.from_pretrained(copied_run.local_path(f"runs/{name}/train/model"))
        for name in ("tiny", "second")
    )
    for source, started in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(source, started, rtol=1e-6, atol=0)
    recipe = recipe_of(autoencoder_folder, **{**changes, "name": "third"})
    wider = recipe.model.model_copy(update={"channels": (64, 64)})
    with pytest.raises(UserError, match=r"runs/tiny/train trained the model .*train.start_from"):
        prepare(recipe.model_copy(update={"model": wider}), copied_run)


def test_restart_deletes_the_files_of_another_run_and_keeps_those_of_the_same_run(
    autoencoder_folder: str, copied_run: Root
) -> None:
    longer = recipe_of(autoencoder_folder, restart=True, steps=30)
    clear_folder(prepare(longer, copied_run), copied_run)
    assert not copied_run.exists(f"{FOLDER}/manifest.json")
    assert copied_run.exists(f"{FOLDER}/checkpoints/checkpoints.json")
    other = recipe_of(autoencoder_folder, restart=True, learning_rate=0.1)
    clear_folder(prepare(other, copied_run), copied_run)
    assert not copied_run.exists(f"{FOLDER}/checkpoints")
    assert not copied_run.exists(f"{FOLDER}/metrics.jsonl")


def test_fewer_steps_than_a_checkpoint_has_are_an_error_without_restart(
    autoencoder_folder: str, copied_run: Root
) -> None:
    with pytest.raises(UserError, match=r"is at step 20, beyond train.steps 10.*train.restart = true"):
        prepare(recipe_of(autoencoder_folder, steps=10), copied_run)
    fewer = recipe_of(autoencoder_folder, steps=10, restart=True)
    clear_folder(prepare(fewer, copied_run), copied_run)
    assert not copied_run.exists(f"{FOLDER}/checkpoints")


def test_a_folder_with_a_running_training_is_an_error_on_all_ranks(autoencoder_folder: str, copied_run: Root) -> None:
    with lease(copied_run, FOLDER):
        code, log = try_to_train(recipe_of(autoencoder_folder, steps=STEPS + 1), copied_run, ranks=2)
    assert code != 0
    errors = re.findall(rf"error: .*runs/tiny/train: process {os.getpid()} on .* has worked on it since", log)
    assert len(errors) == 2, log
