"""Another run can start from the folder of a run, finished or not, in any root."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from retrieval.clip.identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.training.launched import train
from tests.trainer.training_set import DIM, K, make_recipe, new_training_set, write_stage
from trainer.recipe import TrainingRecipe
from trainer.released.import_run import import_model, trained_with
from trainer.released.run_folder import SourceRun

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
            import_model(recipe, source, ENCODER.model_copy(update={"model": "other"}), root)
    next(unfinished.glob("checkpoints/step-00000003/rank-00001*")).write_bytes(b"torn")
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        import_model(recipe, unfinished, ENCODER, root)
    assert not root.list("runs")


def test_size_and_k_of_a_run_are_known(finished: Path, unfinished: Path) -> None:
    assert trained_with(finished) == trained_with(unfinished) == {"size": 64, "k": K}


def digest(folder: Path) -> str:
    run = SourceRun.open(folder)
    assert run
    return run.digest()


def test_unfinished_runs_differ_in_their_weights_and_in_settings_that_may_change(
    unfinished: Path, tmp_path: Path
) -> None:
    shutil.copytree(unfinished, tmp_path / "copy/runs/tiny/train")
    assert digest(tmp_path / "copy/runs/tiny/train") == digest(unfinished)
    index = unfinished / "checkpoints/checkpoints.json"
    stored = json.loads(index.read_text())
    index.write_text(json.dumps(stored | {"settings": stored["settings"] | {"train.learning_rate": 0.5}}))
    assert digest(tmp_path / "copy/runs/tiny/train") != digest(unfinished)
    index.write_text(json.dumps(stored))
    file = next(unfinished.glob("checkpoints/step-00000003/rank-00001*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert digest(tmp_path / "copy/runs/tiny/train") != digest(unfinished)


def test_the_checkpoint_whose_digest_was_computed_is_read(unfinished: Path, recipe: TrainingRecipe) -> None:
    run = SourceRun.open(unfinished)
    assert run
    before, index = run.digest(), unfinished / "checkpoints/checkpoints.json"
    newer = run.index["checkpoints"][-1] | {"tag": "step-00000004", "step": 4}
    index.write_text(json.dumps(run.index | {"checkpoints": [*run.index["checkpoints"], newer]}))
    run.read(recipe)
    assert run.digest() == before
    with pytest.raises(UserError, match=r"step-00000004.* the checkpoint is damaged"):
        digest(unfinished)


def test_other_folders_are_no_runs_and_a_damaged_index_is_refused(unfinished: Path, tmp_path: Path) -> None:
    assert SourceRun.open(tmp_path) is None
    root = Root(tmp_path / "root")
    write_stage(root, "embed", {}, {})
    with pytest.raises(UserError, match=r"embed is the output of embed\. Wanted a run"):
        SourceRun.open(root.local_path("embed"))
    index = unfinished / "checkpoints/checkpoints.json"
    stored = json.loads(index.read_text())
    for content in (b"\xff", b"{", b"[]", b"{}", json.dumps(stored | {"checkpoints": []}).encode()):
        index.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoints\.json is damaged"):
            SourceRun.open(unfinished)
    index.write_text(json.dumps(stored | {"layout": 2}))
    with pytest.raises(UserError, match="or of another version than 3"):
        SourceRun.open(unfinished)
