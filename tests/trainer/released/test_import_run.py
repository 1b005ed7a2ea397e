"""An imported model is a finished run: the sampler opens it, and training can start from it."""

import numpy as np
import pytest
import torch

from retrieval.clip.encoder import Encoder
from retrieval.clip.identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root
from tests.trainer.released.released_model import DIM, MODELS, recipe_of, state_of, write_checkpoint
from tests.trainer.tiny_run import write_clip, write_style_database
from trainer.checkpoint.export import read_model_weights
from trainer.model.autoencoder import Autoencoder
from trainer.model.unet import build_unet
from trainer.released.import_run import import_model
from trainer.sampling.recipe import ComputeConfig
from trainer.sampling.request import Request
from trainer.sampling.sampler import Sampler, TrainedModel

ENCODER = EncoderIdentity(model="ViT-L-14", weights="0" * 16, preprocessing="{}", dim=DIM)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("released") / "model.ckpt", state_of("laion"))


def sample(root, trained, **settings):
    sampler = Sampler.open(root, trained, ComputeConfig(device="cpu", workers=1, threads=1))
    (sampled,) = sampler.sample([Request(prompt="a circle", k=3, steps=2, database="green", **settings)])
    return np.asarray(sampled.picture)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_the_sampler_draws_from_an_imported_model(kind, tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of(kind))
    config, root = recipe_of(kind, tmp_path / "autoencoder"), Root(tmp_path / "root")
    clip = write_clip(tmp_path / "clip")
    encoder = Encoder(clip)
    write_style_database(root, "databases/green", encoder, ["green"])
    import_model(config, path, encoder.identity, root)
    trained = TrainedModel(name=kind, clip=clip, autoencoder=config.autoencoder)
    picture = sample(root, trained)
    assert picture.shape == (64, 64, 3)
    assert not np.array_equal(picture, sample(root, trained, seed=1))


def test_another_run_can_start_from_an_imported_one(checkpoint, tmp_path):
    config, root = recipe_of("laion", tmp_path / "autoencoder"), Root(tmp_path / "root")
    manifest = import_model(config, checkpoint, ENCODER, root)
    assert manifest.config["model"] == config.model.model_dump(mode="json")
    build_unet(config.model).load_state_dict(read_model_weights(root, config.train.folder), strict=True)
    recipe = root.read_json(f"{config.train.folder}/recipe.json")
    assert recipe["encoder"] == ENCODER.model_dump(mode="json")
    assert recipe["latent_shape"] == [16, 4, 4]
    assert recipe["autoencoder_identity"] == Autoencoder.load(config.autoencoder, "cpu").identity


def test_a_finished_import_is_not_repeated_and_a_damaged_one_is(checkpoint, tmp_path):
    config, root = recipe_of("laion", tmp_path / "autoencoder"), Root(tmp_path / "root")
    first = import_model(config, checkpoint, ENCODER, root)
    weights = root.local_path(f"{config.train.folder}/model/diffusion_pytorch_model.safetensors")
    before = weights.stat().st_mtime_ns
    assert import_model(config, checkpoint, ENCODER, root) == first
    assert weights.stat().st_mtime_ns == before
    weights.unlink()
    repeated = import_model(config, checkpoint, ENCODER, root)
    assert weights.is_file()
    assert repeated.checksums() == first.checksums()
    assert read_manifest(root, config.train.folder) == repeated


def test_a_folder_with_another_run_is_not_changed(checkpoint, tmp_path):
    config, root = recipe_of("laion", tmp_path / "autoencoder"), Root(tmp_path / "root")
    root.write_bytes(f"{config.train.folder}/checkpoints/7/complete", b"")
    with pytest.raises(UserError, match=r"runs/laion/train has another run.*\(.*complete\)\. Set train\.name to a new"):
        import_model(config, checkpoint, ENCODER, root)
    root.delete(config.train.folder)
    import_model(config, checkpoint, ENCODER, root)
    other = recipe_of("laion", tmp_path / "autoencoder", train={"k": 7})
    with pytest.raises(UserError, match="has another run"):
        import_model(other, checkpoint, ENCODER, root)


def test_an_existing_autoencoder_must_be_the_same(checkpoint, tmp_path):
    folder = tmp_path / "autoencoder"
    import_model(recipe_of("laion", folder), checkpoint, ENCODER, Root(tmp_path / "one"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    import_model(recipe_of("laion", folder), checkpoint, ENCODER, Root(tmp_path / "other"))
    torch.manual_seed(0)
    state = state_of("laion")
    key = "first_stage_model.post_quant_conv.weight"
    changed = write_checkpoint(tmp_path / "changed.ckpt", state | {key: torch.randn_like(state[key])})
    with pytest.raises(UserError, match="has another autoencoder"):
        import_model(recipe_of("laion", folder), changed, ENCODER, Root(tmp_path / "third"))
    assert weights.read_bytes() == before
    assert not Root(tmp_path / "third").exists("runs/laion/train/manifest.json")
    # The config is written last, so weights without it are an incomplete copy.
    (folder / "config.json").unlink()
    import_model(recipe_of("laion", folder), changed, ENCODER, Root(tmp_path / "third"))
    assert weights.read_bytes() != before


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"context_dim": 64}}, r"\[clip\] has dimension 32, .* context_dim is 64"),
        ({"train": {"size": 60}}, "60 px is no multiple of the autoencoder's factor 16"),
    ],
)
def test_a_recipe_that_does_not_match_is_refused_and_writes_no_run(sections, message, checkpoint, tmp_path):
    root = Root(tmp_path / "root")
    with pytest.raises(UserError, match=message):
        import_model(recipe_of("laion", tmp_path / "autoencoder", **sections), checkpoint, ENCODER, root)
    assert not root.list("runs")


def test_a_missing_source_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.ckpt does not exist"):
        import_model(recipe_of("laion", tmp_path), tmp_path / "nowhere.ckpt", ENCODER, Root(tmp_path / "root"))
