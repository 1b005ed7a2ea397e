"""diffusers folders: diffusers opens them, gives equal latents, and an import gives the same run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file, save_file

from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.storage.manifest import read_manifest, write_manifest
from retrieval.storage.root import Root
from tests.trainer.released.released_model import MODELS, networks, recipe_of, state_of, write_checkpoint
from tests.trainer.released.test_import_run import ENCODER
from tests.trainer.tiny_run import write_clip, write_run, write_style_database
from trainer.checkpoint.export import read_model_weights
from trainer.model.autoencoder import Autoencoder
from trainer.model.diffusion import scheduler_settings
from trainer.model.recipe import DiffusionConfig
from trainer.model.schedulers import make_scheduler
from trainer.model.unet import build_unet
from trainer.released.diffusers_folder import _check_schedule, write_folder
from trainer.released.import_run import import_model
from trainer.sampling.denoising import guided_sample, initial_noise

ONE_KIND = pytest.mark.parametrize("exported", ["laion"], indirect=True)
"""For errors that do not depend on the kind of the model."""
CLASSES = {"laion": AutoencoderKL, "imagenet": VQModel}
KINDS = sorted(MODELS)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """A small released model after import and export: kind, root, recipe and folder."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    config, root = recipe_of(kind, folder / "autoencoder"), Root(folder / "root")
    import_model(config, write_checkpoint(folder / "model.ckpt", state_of(kind)), ENCODER, root)
    write_folder(root, config.train.folder, config.autoencoder, folder / "for-diffusers")
    return kind, root, config, folder / "for-diffusers"


@torch.no_grad()
def test_our_sampler_and_plain_diffusers_give_the_same_latents(exported):
    _, root, config, folder = exported
    shape = (config.model.latent_channels, 8, 8)
    noise, guidance = initial_noise([3, 4], shape), 3.0
    context = torch.nn.functional.normalize(torch.randn(2, 5, 32), dim=-1)

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(20)
    latents = noise
    for t in scheduler.timesteps:
        unconditional = unet(latents, t, encoder_hidden_states=torch.zeros(2, 1, 32)).sample
        conditional = unet(latents, t, encoder_hidden_states=context).sample
        latents = scheduler.step(unconditional + guidance * (conditional - unconditional), t, latents).prev_sample

    ours = build_unet(config.model).eval()
    ours.load_state_dict(read_model_weights(root, config.train.folder))
    diffusion = DiffusionConfig(**root.read_json(f"{config.train.folder}/recipe.json")["diffusion"])
    scale = torch.full((2,), guidance)
    sampled = guided_sample(ours, make_scheduler("ddim", 20, diffusion), noise, context, scale)
    # A random network gives large latents, so the error is relative to their size.
    assert ((sampled - latents).abs().max() / latents.std()) < 1e-4


def test_the_scheduler_of_a_folder_keeps_v_prediction_and_zero_terminal_snr(tmp_path):
    config = DiffusionConfig(prediction="v_prediction", zero_terminal_snr=True)
    DDIMScheduler(**scheduler_settings(config), clip_sample=False).save_pretrained(tmp_path)
    opened = DDIMScheduler.from_pretrained(tmp_path)
    opened.set_timesteps(50)
    assert opened.timesteps.tolist() == make_scheduler("ddim", 50, config).timesteps.tolist()
    assert opened.alphas_cumprod[-1] == 0
    _check_schedule(tmp_path / "scheduler_config.json", config)
    for other, name in (({"zero_terminal_snr": False}, "rescale_betas_zero_snr"), ({"steps": 500}, "num_train")):
        with pytest.raises(UserError, match=name):
            _check_schedule(tmp_path / "scheduler_config.json", config.model_copy(update=other))


@torch.no_grad()
def test_the_exported_autoencoder_has_the_scale_of_the_recipe(exported, tmp_path):
    kind, root, config, _ = exported
    # An autoencoder with the default scale of diffusers in its config.
    default_scale = config.autoencoder.model_copy(update={"path": str(tmp_path / "autoencoder")})
    shutil.copytree(config.autoencoder.path, default_scale.path)
    file = tmp_path / "autoencoder" / "config.json"
    settings = json.loads(file.read_text()) | {"scaling_factor": 0.18215}
    file.write_text(json.dumps(settings))
    autoencoder, run = Autoencoder.load(default_scale, "cpu"), config.train.folder
    shutil.copytree(root.local_path(run), tmp_path / "root" / run)
    manifest = read_manifest(root, run)
    values = manifest.values | {"autoencoder": autoencoder.identity}
    write_manifest(Root(tmp_path / "root"), replace(manifest, values=values))

    write_folder(Root(tmp_path / "root"), run, default_scale, tmp_path / "target")
    vae = CLASSES[kind].from_pretrained(tmp_path / "target", subfolder="vae", use_safetensors=True)
    assert vae.config.scaling_factor == config.autoencoder.scale
    latents = torch.randn(1, config.model.latent_channels, 4, 4)
    decoded = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(decoded, autoencoder.decode(latents))


@ONE_KIND
def test_a_run_is_not_exported_with_another_autoencoder(exported, tmp_path):
    kind, root, config, _ = exported
    other = recipe_of("laion" if kind == "imagenet" else "imagenet", tmp_path / "autoencoder")
    state = state_of(other.train.name)
    import_model(other, write_checkpoint(tmp_path / "model.ckpt", state), ENCODER, Root(tmp_path / "root"))
    with pytest.raises(UserError, match="was trained on latents of autoencoder"):
        write_folder(root, config.train.folder, other.autoencoder, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_the_code_of_the_model_card_opens_the_folder_and_draws(exported, monkeypatch, tmp_path):
    kind, _, _, folder = exported
    card = (folder / "README.md").read_text()
    assert f"{sum(w.numel() for w in networks(kind)[0].parameters()):,} parameters" in card
    assert "trained at 64 px" in card
    assert "with 4 neighbors" in card
    assert {"laion": "each of length 1", "imagenet": "not normalized"}[kind] in card
    opens, draws = (block.split("```")[0] for block in card.split("```python")[1:])
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    opened: dict[str, object] = {}
    exec(opens, opened)
    assert isinstance(opened["pipeline"].vae, CLASSES[kind])
    clip = write_clip(tmp_path / "clip")
    write_style_database(Root(tmp_path), "databases/green", Encoder(clip), ["green"], rows=8)
    # What the card leaves to its reader, and fewer steps.
    for placeholder, value in (
        ('model="ViT-L-14", pretrained="..."', f'model="{clip.model}"'),
        ("databases/NAME", str(tmp_path / "databases/green")),
        ("k=4", "k=4, num_inference_steps=2"),
    ):
        assert draws.count(placeholder) == 1
        draws = draws.replace(placeholder, value)
    exec(draws, opened)
    assert [picture.size for picture in opened["pictures"]] == [(64, 64)]


def test_an_exported_folder_is_imported_as_the_same_run(exported, tmp_path):
    kind, root, config, folder = exported
    recipe, target = recipe_of(kind, tmp_path / "autoencoder"), Root(tmp_path / "root")
    import_model(recipe, folder, ENCODER, target)
    exported_weights, imported = (read_model_weights(each, config.train.folder) for each in (root, target))
    assert exported_weights.keys() == imported.keys()
    assert all(torch.equal(tensor, imported[name]) for name, tensor in exported_weights.items())
    assert Autoencoder.load(recipe.autoencoder, "cpu").identity == Autoencoder.load(config.autoencoder, "cpu").identity


def test_a_folder_whose_model_takes_vectors_of_another_length_is_refused(exported, tmp_path):
    kind, _, _, folder = exported
    theirs, other = ("unit", "raw") if kind == "laion" else ("raw", "unit")
    recipe = recipe_of(kind, tmp_path / "new", model={"context_norm": other})
    with pytest.raises(UserError, match=f'context_norm "{theirs}", the recipe has "{other}"'):
        import_model(recipe, folder, ENCODER, Root(tmp_path / "root"))


@ONE_KIND
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"channels_per_head": 8}}, "attention_head_dim"),
        ({"model": {"norm_groups": 16}}, "norm_num_groups 32, .* gives 16"),
        ({"model": {"attention": (1, 4)}}, "down_block_types"),
        ({"diffusion": {"beta_end": 0.02}}, "has beta_end .* gives 0.02"),
        ({"diffusion": {"prediction": "v_prediction"}}, "prediction_type 'epsilon'"),
        ({"autoencoder": {"scale": 0.5}}, "scaling_factor .* scale is 0.5"),
    ],
)
def test_a_folder_with_another_model_is_refused(exported, sections, message, tmp_path):
    kind, _, _, folder = exported
    with pytest.raises(UserError, match=message):
        import_model(recipe_of(kind, tmp_path / "new", **sections), folder, ENCODER, Root(tmp_path / "root"))


@ONE_KIND
def test_a_folder_with_a_missing_tensor_config_or_weights_file_is_refused(exported, tmp_path):
    kind, root, config, _ = exported
    folder = tmp_path / "folder"
    write_folder(root, config.train.folder, config.autoencoder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_out.bias"]
    save_file(tensors, weights)
    recipe, target = recipe_of(kind, tmp_path / "new"), Root(tmp_path / "root")
    with pytest.raises(UserError, match=r"1 tensors are missing, .*\(conv_out.bias\)"):
        import_model(recipe, folder, ENCODER, target)
    weights.write_bytes(b"none")
    with pytest.raises(UserError, match="not a safetensors file"):
        import_model(recipe, folder, ENCODER, target)
    weights.unlink()
    with pytest.raises(UserError, match="weights must be one safetensors file"):
        import_model(recipe, folder, ENCODER, target)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match=r"scheduler_config.json is missing"):
        import_model(recipe, folder, ENCODER, target)


@ONE_KIND
def test_a_target_that_is_not_empty_is_not_changed(exported, tmp_path):
    _, root, config, _ = exported
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        write_folder(root, config.train.folder, config.autoencoder, target)
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_a_run_with_a_patch_autoencoder_is_exported_without_vae(tmp_path):
    root, trained = write_run(tmp_path)
    recipe = {"size": 32, "k": 4, "latent_shape": [4, 8, 8], "autoencoder": {"scale": 1.0}}
    recipe["encoder"] = {"model": "clip", "dim": 32}
    stored = root.read_json(f"{trained.folder}/recipe.json")
    root.write_json(f"{trained.folder}/recipe.json", stored | recipe)
    write_folder(root, trained.folder, trained.autoencoder, tmp_path / "target")
    assert not (tmp_path / "target" / "vae").exists()
    assert "vae" not in (tmp_path / "target" / "README.md").read_text()
    settings = json.loads((tmp_path / "target" / "scheduler" / "scheduler_config.json").read_text())
    assert settings["prediction_type"] == "v_prediction"
    UNet2DConditionModel.from_pretrained(tmp_path / "target", subfolder="unet")


def test_a_failed_export_leaves_no_files(tmp_path):
    root, trained = write_run(tmp_path / "run")
    root.delete(f"{trained.folder}/model/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"safetensors is missing"):
        write_folder(root, trained.folder, trained.autoencoder, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
