"""Another run can start from the folder of a run, finished or not, in any root."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from retrieval.clip.identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.training.launched import train
from tests.trainer.training_set import DIM, make_recipe, new_training_set
from trainer.recipe import TrainingRecipe
from trainer.released.import_run import import_model

ENCODER = EncoderIdentity(model="test", weights="0" * 16, preprocessing="{}", dim=DIM)
WEIGHTS = "model/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, autoencoder_folder: str) -> Path:
    """The folder of a finished run, which keeps its last checkpoint."""
    root = new_training_set(tmp_path_factory.mktemp("finished"), autoencoder_folder)
    recipe = make_recipe(autoencoder_folder, steps=3)
    train(recipe, root, ranks=2)
    return root.local_path(recipe.train.folder)


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same run as if it had not come to its end."""
    folder = tmp_path / "moved/runs/tiny/train"
    shutil.copytree(finished, folder)
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "model")
    return folder


@pytest.fixture
def recipe(autoencoder_folder: str) -> TrainingRecipe:
    return make_recipe(autoencoder_folder, name="start")


def changed(recipe: TrainingRecipe, section: str, **values: object) -> TrainingRecipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


def test_finished_and_unfinished_runs_give_their_averaged_weights(
    finished: Path, unfinished: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    expected = load_file(finished / WEIGHTS)
    for number, source in enumerate((finished, unfinished)):
        root = Root(tmp_path / str(number))
        manifest = import_model(recipe, source, ENCODER, root)
        weights = load_file(root.local_path(f"runs/start/train/{WEIGHTS}"))
        assert weights.keys() == expected.keys()
        assert all(bool((weights[name] == expected[name]).all()) for name in expected)
        assert import_model(recipe, source, ENCODER, root) == manifest


def test_a_run_with_other_settings_than_the_recipe_is_refused(
    finished: Path, unfinished: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    root = Root(tmp_path / "other")
    for source in (finished, unfinished):
        with pytest.raises(UserError, match=r"train has model.layers 1, the recipe has 2"):
            import_model(changed(recipe, "model", layers=2), source, ENCODER, root)
        with pytest.raises(UserError, match=r"train has diffusion.beta_end 0.015, the recipe has 0.02"):
            import_model(changed(recipe, "diffusion", beta_end=0.02), source, ENCODER, root)
        with pytest.raises(UserError, match=r"was trained on latents of autoencoder"):
            import_model(changed(recipe, "autoencoder", scale=0.5), source, ENCODER, root)
    with pytest.raises(UserError, match=r"was trained with .*'model': 'test'"):
        import_model(recipe, finished, ENCODER.model_copy(update={"model": "other"}), root)
    next(unfinished.glob("checkpoints/step-00000003/rank-00001*")).write_bytes(b"torn")
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        import_model(recipe, unfinished, ENCODER, root)
    assert not root.list("runs")
