"""Validation and previews during training on one and two gloo ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from retrieval.storage.manifest import read_manifest, write_manifest
from retrieval.storage.root import Root
from tests.trainer.tiny_run import write_clip
from tests.trainer.training.launched import folder_of, train
from tests.trainer.training_set import make_recipe, new_training_set
from trainer.data.loader import Loader
from trainer.data.plan import make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import TrainingRecipe
from trainer.tracking.training_log import (
    KID,
    METRICS,
    VALIDATION,
    KidMetrics,
    StepMetrics,
    ValidationMetrics,
    read_entries,
    read_step_metrics,
)

STORED = {1: 1.048975, 2: 1.0716438, 5: 0.7587282, 10: 0.5363206, 15: 0.3842816, 20: 0.294915}
STORED_HELD_OUT = (0.2681738, 0.2914357)


def metrics_of(recipe: TrainingRecipe, root: Root) -> list[StepMetrics]:
    return read_step_metrics(folder_of(recipe, root) / METRICS)


def validations_of(recipe: TrainingRecipe, root: Root) -> list[ValidationMetrics]:
    return read_entries(folder_of(recipe, root) / VALIDATION, ValidationMetrics)


def distances_of(recipe: TrainingRecipe, root: Root) -> list[KidMetrics]:
    return read_entries(folder_of(recipe, root) / KID, KidMetrics)


def losses(entry: ValidationMetrics) -> list[float | None]:
    return [entry.loss, *entry.loss_by_quartile, entry.ema_loss, *entry.ema_loss_by_quartile]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> ClipConfig:
    """An untrained CLIP, which encoded the neighbors."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: str, clip: ClipConfig) -> Root:
    """A root with neighbors and latents for all runs of this file."""
    root = new_training_set(tmp_path_factory.mktemp("root"), autoencoder_folder)
    neighbors = read_manifest(root, "neighbors")
    values = neighbors.values | {"encoder": Encoder(clip).identity.model_dump()}
    write_manifest(root, replace(neighbors, values=values))
    return root


def recipe_of(autoencoder_folder: str, clip: ClipConfig, **changes: object) -> TrainingRecipe:
    """A recipe with section clip. changes: of section train."""
    sections = make_recipe(autoencoder_folder, micro_batch=4).model_dump()
    return TrainingRecipe.model_validate(sections | {"train": sections["train"] | changes, "clip": clip.model_dump()})


@pytest.fixture(scope="module")
def unchanged(root: Root, autoencoder_folder: str, clip: ClipConfig) -> dict[str, TrainingRecipe]:
    """Runs of two steps that do not change the weights: on one rank, and on two with ZeRO 3."""
    runs = {}
    for name, ranks, zero_stage in (("single", 1, 1), ("sharded", 2, 3)):
        changes = {"steps": 2, "learning_rate": 1e-30, "validation_images": 9}
        changes |= {"validate_every": 2, "preview_every": 2, "kid_every": 2, "kid_images": 5}
        runs[name] = recipe_of(autoencoder_folder, clip, name=name, zero_stage=zero_stage, **changes)
        train(runs[name], root, ranks)
    return runs


def test_the_held_out_loss_does_not_depend_on_the_number_of_ranks_or_zero_stage(
    root: Root, unchanged: dict[str, TrainingRecipe]
) -> None:
    single, sharded = (validations_of(recipe, root) for recipe in unchanged.values())
    assert [entry.step for entry in single] == [2]
    assert single[0].loss == pytest.approx(single[0].ema_loss, rel=1e-6)
    assert losses(sharded[0]) == pytest.approx(losses(single[0]), rel=1e-6)


def test_the_preview_does_not_depend_on_the_zero_stage(root: Root, unchanged: dict[str, TrainingRecipe]) -> None:
    sheets = [
        np.asarray(Image.open(folder_of(recipe, root) / "previews" / "00000002.png"), np.int16)
        for recipe in unchanged.values()
    ]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1


def test_the_distance_of_samples_does_not_depend_on_the_number_of_ranks_or_zero_stage(
    root: Root, unchanged: dict[str, TrainingRecipe]
) -> None:
    [single], [sharded] = (distances_of(recipe, root) for recipe in unchanged.values())
    assert (single.step, single.images) == (sharded.step, sharded.images) == (2, 5)
    assert single.kid > 0
    assert sharded.kid == pytest.approx(single.kid, rel=1e-3)


def test_step_metrics_have_the_loss_by_quartile_of_the_timesteps_of_their_batch(
    root: Root, unchanged: dict[str, TrainingRecipe]
) -> None:
    recipe = unchanged["sharded"]
    plan = make_plan(recipe, root, Autoencoder.load(recipe.autoencoder, "cpu"))
    loader = Loader(plan, root, 0, 1)
    entries = metrics_of(recipe, root)
    assert len(entries) == 2
    for entry in entries:
        counts = torch.bincount(loader.batch(entry.step - 1).timesteps // 250, minlength=4).tolist()
        quartiles = entry.loss_by_quartile
        assert [loss is None for loss in quartiles] == [count == 0 for count in counts]
        shares = (count / 8 * (loss or 0) for count, loss in zip(counts, quartiles, strict=True))
        assert sum(shares) == pytest.approx(entry.loss, rel=1e-6)
        assert entry.mfu is None
        assert 0.05 < entry.memory_gib < 8
        assert entry.images_per_s == pytest.approx(8 / entry.seconds_per_step)


@pytest.fixture(scope="module")
def whole(root: Root, autoencoder_folder: str, clip: ClipConfig) -> TrainingRecipe:
    """An uninterrupted run of twenty steps on one rank."""
    changes = {"validation_images": 12, "validate_every": 5, "preview_every": 10, "kid_every": 10, "kid_images": 4}
    recipe = recipe_of(autoencoder_folder, clip, name="whole", steps=20, checkpoint_every=10, **changes)
    log = train(recipe, root)
    assert "step 20/20  held-out loss " in log
    assert "step 20/20  KID " in log
    assert "no data sheet of CPU, no MFU" in log
    return recipe


def test_twenty_seeded_steps_give_the_stored_losses(root: Root, whole: TrainingRecipe) -> None:
    # Another number of ranks or kernels of other processors change these by less than 1e-6 of their value.
    for step, loss in STORED.items():
        assert metrics_of(whole, root)[step - 1].loss == pytest.approx(loss, rel=1e-4)
    last = validations_of(whole, root)[-1]
    assert (last.loss, last.ema_loss) == pytest.approx(STORED_HELD_OUT, rel=1e-4)


def test_the_held_out_loss_falls_and_differs_from_that_of_the_averaged_weights(
    root: Root, whole: TrainingRecipe
) -> None:
    validations = validations_of(whole, root)
    assert [entry.step for entry in validations] == [5, 10, 15, 20]
    # Twelve images are three for each quartile.
    for entry in validations:
        assert entry.loss == pytest.approx(np.mean(entry.loss_by_quartile), rel=1e-9)
        assert entry.ema_loss == pytest.approx(np.mean(entry.ema_loss_by_quartile), rel=1e-9)
        assert abs(entry.loss / entry.ema_loss - 1) > 1e-4
    assert validations[-1].loss < 0.8 * validations[0].loss


def test_a_resumed_run_equals_an_uninterrupted_one_and_monitoring_does_not_change_training(
    root: Root, autoencoder_folder: str, whole: TrainingRecipe
) -> None:
    def history(recipe: TrainingRecipe) -> list[tuple[int, float, float]]:
        return [(entry.step, entry.loss, entry.grad_norm) for entry in metrics_of(recipe, root)]

    def sheets(recipe: TrainingRecipe) -> dict[str, bytes]:
        folder = folder_of(recipe, root) / "previews"
        return {path.name: path.read_bytes() for path in folder.glob("*.png")}

    assert sorted(sheets(whole)) == ["00000010.png", "00000020.png"]
    assert sheets(whole)["00000010.png"] != sheets(whole)["00000020.png"]
    resumed = whole.model_copy(update={"train": whole.train.model_copy(update={"name": "resumed"})})
    unmonitored = {"validate_every": 0, "preview_every": 0, "kid_every": 0, "steps": 10}
    train(resumed.model_copy(update={"train": resumed.train.model_copy(update=unmonitored)}), root)
    assert not validations_of(resumed, root)
    train(resumed, root)
    assert history(resumed) == history(whole)
    assert validations_of(resumed, root) == validations_of(whole, root)[2:]
    assert [entry.step for entry in distances_of(whole, root)] == [10, 20]
    assert distances_of(resumed, root) == distances_of(whole, root)[1:]
    assert sheets(resumed) == {"00000020.png": sheets(whole)["00000020.png"]}
