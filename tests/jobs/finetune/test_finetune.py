"""finetune: from a released checkpoint and a folder of pictures to a fine-tuned model, with the project's recipe."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import train as train_job
from jobs.cli.recipe import Recipe, load_recipe
from jobs.finetune.__main__ import import_start, run
from pipeline.import_pictures import Sources
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from tests.jobs.test_imagenet import write_pictures
from tests.pipeline.shards_in_process import shards_in_process
from tests.trainer.released.released_model import MODELS, state_of, write_checkpoint
from tests.trainer.tiny_run import write_clip
from tests.trainer.training.launched import train
from trainer.recipe import TrainConfig, TrainingRecipe

FINETUNE = Path(__file__).resolve().parents[3] / "jobs/configs/finetune.toml"
MODEL = MODELS["laion"]
TINY = {
    "clip.pretrained": '""',
    "download.train_min_edge": 64,
    "embed.gpus_per_worker": 0.0,
    "neighbors.k": 2,
    "neighbors.near_copy_similarity": 0.999999,
    "latents.size": 64,
    "latents.views": 1,
    "latents.gpus_per_worker": 0.0,
    "model.context_dim": MODEL.context_dim,
    "model.channels": list(MODEL.channels),
    "model.attention": list(MODEL.attention),
    "model.channels_per_head": MODEL.channels_per_head,
    "train.size": 64,
    "train.k": 2,
    "train.global_batch": 4,
    "train.interleaved_shards": 1,
    "train.steps": 2,
    "train.optimizer": "adamw",
    "train.precision": "fp32",
    "train.validation_images": 2,
    "train.validate_every": 2,
    "train.workers": 1,
} | {f"{stage}.workers": 1 for stage in ("download", "embed", "index", "neighbors", "latents")}


def recipe_of(folder: Path, **changes: object) -> Recipe:
    settings = {"root": folder / "root", "clip.model": f"local-dir:{folder}/clip", "autoencoder.path": folder / "kl"}
    values = settings | TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return load_recipe(FINETUNE, [f"{key}={value}" for key, value in values.items()])


@contextmanager
def in_process(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stages run in this process, and the ranks are forked instead of launched."""

    def launch(config: TrainingRecipe, recipe: Recipe, hostfile: Path | None) -> int:
        train(config, recipe.root)
        return 0

    patch.setattr(train_job, "_launch", launch)
    with shards_in_process():
        yield


def test_a_released_checkpoint_is_fine_tuned_on_a_folder_of_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_pictures(tmp_path / "pictures", 5, 30)
    write_clip(tmp_path / "clip")
    checkpoint, sources = write_checkpoint(tmp_path / "model.ckpt", state_of("laion")), Sources(tmp_path / "pictures")
    recipe = recipe_of(tmp_path)
    with in_process(monkeypatch):
        run(recipe, checkpoint, sources)
        root = recipe.root
        start, tuned = read_manifest(root, "runs/released/train"), read_manifest(root, "runs/finetuned/train")
        assert tuned.upstream["start_from"] == start.fingerprint
        assert tuned.values["images"] == 8
        assert read_manifest(root, "download").values["urls"] == 30
        caplog.set_level(logging.INFO)
        run(recipe, checkpoint, sources)
        assert "already finished" in caplog.text
        # Adapters start from the same import, which does not depend on the settings of training.
        changes = {"train__lora__rank": 2, "train__ema_decay": 0.999}
        run(recipe_of(tmp_path, train__name="adapters", **changes), checkpoint, sources)
        adapters = read_manifest(root, "runs/adapters/train")
        assert adapters.upstream["start_from"] == start.fingerprint
        assert "runs/adapters/train/adapter/adapter_model.safetensors" in adapters.checksums()
        assert read_manifest(root, "runs/released/train") == start


def test_a_recipe_without_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune.toml has no train.start_from: set it"):
        run(recipe_of(tmp_path, train__start_from='""'), tmp_path / "model.ckpt", Sources(tmp_path))


def test_the_8_bit_optimizer_is_checked_before_any_work(tmp_path: Path) -> None:
    assert load_recipe(FINETUNE, [])[TrainConfig].ranks == 1
    with pytest.raises(UserError, match=r"works on one rank, this run has 2\. Set train\.ranks = 1"):
        run(recipe_of(tmp_path, train__optimizer="adamw_8bit", train__ranks=2), tmp_path / "none", Sources(tmp_path))


def test_the_start_has_the_size_and_k_of_its_source(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    checkpoint, recipe = write_checkpoint(tmp_path / "model.ckpt", state_of("laion")), recipe_of(tmp_path)
    import_start(recipe, checkpoint)
    # A checkpoint does not tell them.
    with pytest.raises(UserError, match=r"runs/released/train has another run.* Set train\.start_from to a new name"):
        import_start(recipe_of(tmp_path, train__k=3), checkpoint)
    source = recipe.root.local_path("runs/released/train")
    for size in (64, 32):
        import_start(recipe_of(tmp_path, train__start_from="copy", train__size=size), source)
    train = read_manifest(recipe.root, "runs/copy/train").config["train"]
    assert (train["size"], train["k"]) == (64, 2)
