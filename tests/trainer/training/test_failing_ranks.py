"""Ranks end when one of them fails. Otherwise no launcher would start them again."""

import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.crashes.store import Store
from retrieval.storage.root import Root
from tests.trainer.training.launched import fork
from tests.trainer.training_set import make_recipe, write_training_set
from trainer.checkpoint.checkpoint import Progress
from trainer.data.loader import Loader
from trainer.model.autoencoder import Autoencoder
from trainer.training.loop import Termination, _Loop, train_steps
from trainer.training.train import clear_folder, prepare


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_no_thread_of_the_loader_outlives_a_step_that_fails(
    autoencoder_folder: str, object_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its exit Python waits for such threads. With a bucket one of them runs until the batches are closed."""
    begun = []

    def step(_: _Loop, batches: Any, termination: Termination) -> bool:
        begun.append(batches)
        next(batches)
        assert len(loader_threads()) > 1
        raise RuntimeError("out of memory")

    root, recipe = Root(object_store.url("failing")), make_recipe(autoencoder_folder, steps=1000)
    write_training_set(root, Autoencoder.load(recipe.autoencoder, "cpu").identity)
    loader = Loader(prepare(recipe, root), root, 0, 1)
    monkeypatch.setattr(_Loop, "__init__", lambda *_: None)
    monkeypatch.setattr(_Loop, "step", step)
    session: Any = SimpleNamespace(config=recipe.train, loader=loader, profiler=None)
    # As at the exit of a process, the error with its frames is kept.
    with pytest.raises(RuntimeError, match="out of memory") as _raised:
        train_steps(session, Progress(), Termination())
    alive = loader_threads()
    begun[0].close()
    assert not alive


def test_all_ranks_end_with_the_error_of_rank_0_that_cannot_publish_a_checkpoint(
    training_set: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    recipe = make_recipe(autoencoder_folder, steps=20, checkpoint_every=4, micro_batch=4, timeout_minutes=10)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    code, log = fork(["full_rank", str(tmp_path / "recipe.json"), training_set.url], tmp_path / "log", ranks=2)
    errors = re.findall(r"error: .*step-00000004: rank 0 could not write its part.*", log)
    assert (code, len(errors)) == (1, 2), log
    assert len([error for error in errors if "No space left on device" in error]) == 1
    assert not training_set.exists("runs/tiny/train/checkpoints/checkpoints.json")


def test_all_ranks_end_with_the_error_of_rank_0_that_cannot_write_the_model(
    training_set: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    recipe = make_recipe(autoencoder_folder, steps=2, micro_batch=4, timeout_minutes=10)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    argv = ["unexported_rank", str(tmp_path / "recipe.json"), training_set.url]
    code, log = fork(argv, tmp_path / "log", ranks=2)
    assert code == 1, log
    assert "[rank0]: OSError: No space left on device" in log
    assert "[rank1]: RuntimeError: rank 0: OSError: No space left on device" in log


def test_a_network_that_cannot_publish_checkpoints_ends_a_run_before_its_first_step(
    training_set: Root, autoencoder_folder: str, tmp_path: Path
) -> None:
    recipe = make_recipe(autoencoder_folder, steps=20, checkpoint_every=4, micro_batch=4, timeout_minutes=1)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    argv = ["unconnected_rank", str(tmp_path / "recipe.json"), training_set.url]
    code, log = fork(argv, tmp_path / "log", ranks=2)
    assert code == 1, log
    assert "error: Gloo, which publishes checkpoints, does not connect the ranks" in log
    assert "Set GLOO_SOCKET_IFNAME on each machine" in log
    assert not re.search(r"step \d+/20", log), log


def test_the_unfinished_file_of_a_killed_export_is_deleted_by_the_next_start(
    training_set: Root, autoencoder_folder: str
) -> None:
    plan = prepare(make_recipe(autoencoder_folder), training_set)
    unfinished = training_set.local_path("runs/tiny/train/model/.partial-1-diffusion_pytorch_model.safetensors")
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(b"5 GB")
    clear_folder(plan, training_set)
    assert not unfinished.exists()
