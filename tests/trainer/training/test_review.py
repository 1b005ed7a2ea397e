"""Runs of one and two gloo ranks that are looked at while they train."""

import numpy as np
import pytest
import torch
from PIL import Image

from retrieval.storage.root import Root
from tests.trainer.training.launched import folder_of, train
from tests.trainer.training_set import make_recipe, write_training_set
from trainer.data.loader import Loader
from trainer.data.plan import make_plan
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import Training
from trainer.tracking.progress import METRICS, VALIDATION, Point, Validation, read_points, read_validations

STORED = {1: 1.048975, 2: 1.0716438, 5: 0.7587282, 10: 0.5363206, 15: 0.3842816, 20: 0.294915}
STORED_HELD_OUT = (0.2681738, 0.2914357)


def points_of(recipe: Training, root: Root) -> list[Point]:
    return read_points(folder_of(recipe, root) / METRICS)


def validations_of(recipe: Training, root: Root) -> list[Validation]:
    return read_validations(folder_of(recipe, root) / VALIDATION)


def losses(found: Validation) -> list[float | None]:
    return [found.loss, *found.loss_by_quartile, found.ema_loss, *found.ema_loss_by_quartile]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: str) -> Root:
    """A root with neighbors and latents, where all tests train."""
    made = Root(tmp_path_factory.mktemp("root"))
    autoencoder = Autoencoder.load(make_recipe(autoencoder_folder).autoencoder, "cpu")
    write_training_set(made, autoencoder.identity)
    return made


@pytest.fixture(scope="module")
def still(root: Root, autoencoder_folder: str) -> dict[str, Training]:
    """Two steps too small to move the weights: on one rank, and on two that split them."""
    runs = {}
    for name, ranks, zero_stage in (("alone", 1, 1), ("split", 2, 3)):
        changes = {"steps": 2, "learning_rate": 1e-30, "validation_images": 9}
        changes |= {"validate_every": 2, "preview_every": 2}
        runs[name] = make_recipe(autoencoder_folder, name=name, zero_stage=zero_stage, **changes)
        train(runs[name], root, ranks)
    return runs


def test_the_held_out_loss_is_the_same_on_any_number_of_ranks_however_they_split_the_weights(
    root: Root, still: dict[str, Training]
) -> None:
    alone, split = (validations_of(recipe, root) for recipe in still.values())
    assert [found.step for found in alone] == [2]
    assert alone[0].loss == pytest.approx(alone[0].ema_loss, rel=1e-6)
    assert losses(split[0]) == pytest.approx(losses(alone[0]), rel=1e-6)


def test_ranks_that_split_the_weights_draw_the_same_sheet(root: Root, still: dict[str, Training]) -> None:
    sheets = [
        np.asarray(Image.open(folder_of(recipe, root) / "previews" / "00000002.png"), np.int16)
        for recipe in still.values()
    ]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1


def test_a_point_tells_the_loss_by_quartile_of_the_timesteps_of_its_batch(
    root: Root, still: dict[str, Training]
) -> None:
    recipe = still["split"]
    plan = make_plan(recipe, root, Autoencoder.load(recipe.autoencoder, "cpu"))
    loader = Loader(plan, root, 0, 1)
    points = points_of(recipe, root)
    assert len(points) == 2
    for point in points:
        counts = torch.bincount(loader.batch(point.step - 1).timesteps // 250, minlength=4).tolist()
        assert [one is None for one in point.loss_by_quartile] == [count == 0 for count in counts]
        shares = (count / 8 * (one or 0) for count, one in zip(counts, point.loss_by_quartile, strict=True))
        assert sum(shares) == pytest.approx(point.loss, rel=1e-6)
        assert 0 < point.mfu < 2
        assert 0.05 < point.memory_gib < 8
        assert point.images_per_s == pytest.approx(8 / point.seconds_per_step)


@pytest.fixture(scope="module")
def whole(root: Root, autoencoder_folder: str) -> Training:
    """Twenty steps without a stop, on one rank."""
    looks = {"validation_images": 12, "validate_every": 5, "preview_every": 10}
    recipe = make_recipe(autoencoder_folder, name="whole", steps=20, checkpoint_every=10, **looks)
    log = train(recipe, root)
    assert "step 20/20  held-out loss " in log
    assert "MFU counts" in log
    return recipe


def test_twenty_seeded_steps_give_the_stored_losses(root: Root, whole: Training) -> None:
    # Two ranks instead of one, or kernels for other processors, move these by less than 1e-6 of their value.
    for step, loss in STORED.items():
        assert points_of(whole, root)[step - 1].loss == pytest.approx(loss, rel=1e-4)
    last = validations_of(whole, root)[-1]
    assert (last.loss, last.ema_loss) == pytest.approx(STORED_HELD_OUT, rel=1e-4)


def test_the_held_out_loss_falls_and_that_of_the_averaged_weights_is_another(
    root: Root, whole: Training
) -> None:
    validations = validations_of(whole, root)
    assert [found.step for found in validations] == [5, 10, 15, 20]
    # Twelve images are three of each quartile.
    for found in validations:
        assert found.loss == pytest.approx(np.mean(found.loss_by_quartile), rel=1e-9)
        assert found.ema_loss == pytest.approx(np.mean(found.ema_loss_by_quartile), rel=1e-9)
        assert abs(found.loss / found.ema_loss - 1) > 1e-4
    assert validations[-1].loss < 0.8 * validations[0].loss


def test_a_run_that_stopped_sees_what_one_that_never_stopped_does_and_seeing_changes_nothing(
    root: Root, autoencoder_folder: str, whole: Training
) -> None:
    def trail(recipe: Training) -> list[tuple[int, float, float]]:
        return [(point.step, point.loss, point.grad_norm) for point in points_of(recipe, root)]

    def sheets(recipe: Training) -> dict[str, bytes]:
        return {one.name: one.read_bytes() for one in (folder_of(recipe, root) / "previews").glob("*.png")}

    assert sorted(sheets(whole)) == ["00000010.png", "00000020.png"]
    assert sheets(whole)["00000010.png"] != sheets(whole)["00000020.png"]
    blind = {"validate_every": 0, "preview_every": 0, "steps": 10, "name": "parts"}
    parts = whole.model_copy(update={"train": whole.train.model_copy(update={"name": "parts"})})
    train(parts.model_copy(update={"train": parts.train.model_copy(update=blind)}), root)
    assert not validations_of(parts, root)
    train(parts, root)
    assert trail(parts) == trail(whole)
    assert validations_of(parts, root) == validations_of(whole, root)[2:]
    assert sheets(parts) == {"00000020.png": sheets(whole)["00000020.png"]}
