"""ReleasedModel checkpoints: the same numbers come out, every tensor has its place, and nothing else gets in."""

import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from retrieval.errors import UserError
from tests.trainer.released import compvis
from tests.trainer.released.released_model import (
    BETA_END,
    MODELS,
    networks,
    recipe_of,
    state_of,
    write_checkpoint,
)
from trainer.model.autoencoder import Autoencoder, kl_f16, vq_f4
from trainer.model.unet import build_unet
from trainer.recipe import ModelConfig
from trainer.released.checkpoint_import import ReleasedModel, read_checkpoint
from trainer.released.tensor_names import autoencoder_key, average_key, unet_key

KINDS = sorted(MODELS)
PAPER = {
    "laion": (
        ModelConfig(
            latent_channels=16, context_dim=768, channels=(448, 896, 1344, 1792), attention=(1, 2, 4)
        ),
        1_335_480_400,
    ),
    "imagenet": (
        ModelConfig(latent_channels=3, context_dim=512, channels=(192, 384, 576, 960), attention=(2, 4, 8)),
        400_920_579,
    ),
}


def read(path: Path, kind: str, **sections) -> ReleasedModel:
    scratch = path.parent / "imported"
    return read_checkpoint(path, recipe_of(kind, path.parent / "autoencoder", **sections), scratch)


def opened(released: ReleasedModel, kind: str) -> torch.nn.Module:
    unet = build_unet(MODELS[kind])
    unet.load_state_dict(released.unet)
    return unet.eval()


@torch.no_grad()
def outputs(kind: str, *unets: torch.nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    noisy = torch.randn(3, MODELS[kind].latent_channels, 8, 8, generator=generator)
    context = torch.randn(3, 5, MODELS[kind].context_dim, generator=generator)
    t = torch.tensor([0, 500, 999])
    given = [unet(noisy, t, context) for unet in unets]
    return [one if isinstance(one, torch.Tensor) else one.sample for one in given]


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert wanted.abs().mean() > 0.1, "a network that says nothing proves nothing"
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_averaged_unet_gives_the_original_networks_outputs(kind, tmp_path):
    released = read(write_checkpoint(tmp_path / "model.ckpt", state_of(kind)), kind)
    unet, averaged, _ = networks(kind)
    wanted, found = outputs(kind, averaged, opened(released, kind))
    same(found, wanted)
    assert (found - outputs(kind, unet, averaged)[0]).abs().max() > 0.1, "the average is another network"


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_average_the_weights_themselves_are_taken(kind, tmp_path):
    unet, _, first_stage = networks(kind)
    state = compvis.checkpoint(unet, first_stage, BETA_END[kind])
    released = read(write_checkpoint(tmp_path / "model.ckpt", state), kind)
    same(*reversed(outputs(kind, unet, opened(released, kind))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_stage_gives_the_original_networks_latents_and_pictures(kind, tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of(kind))
    config = recipe_of(kind, read(path, kind).autoencoder).autoencoder
    autoencoder, original = Autoencoder.load(config, "cpu"), networks(kind)[2]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        moments = original.moments(images)
        same(autoencoder.encode_moments(images) / config.scale, moments)
        latents = moments.chunk(2, dim=1)[0]
        # in the range where clipping does not hide a difference
        pictures = original.decode(latents)
        found = autoencoder.decode(latents * config.scale)
    torch.testing.assert_close(found, pictures.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    assert (pictures.abs() < 1).float().mean() > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_papers_model_has_one_key_in_its_shape(kind):
    config, parameters = PAPER[kind]
    with torch.device("meta"):
        theirs, ours = compvis.UNetModel(config), build_unet(config)
    wanted = {f"model.diffusion_model.{name}": w.shape for name, w in theirs.named_parameters()}
    keys = {name: unet_key(name, config) for name in ours.state_dict()}
    found = {keys[name]: weight.shape for name, weight in ours.state_dict().items()}
    assert found == wanted
    assert len(keys) == len(found) == 688
    assert sum(shape.numel() for shape in found.values()) == parameters
    averaged = {average_key(key): shape for key, shape in found.items()}
    assert len(averaged) == len(found)
    with torch.device("meta"):
        state = compvis.average(theirs)
    assert averaged.keys() == state.keys() - {"model_ema.decay", "model_ema.num_updates"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_papers_autoencoder_has_one_key_in_its_shape(kind):
    with torch.device("meta"):
        theirs, ours = (
            (compvis.Variational(128), kl_f16()) if kind == "laion" else (compvis.Quantized(128), vq_f4())
        )
    wanted = {f"first_stage_model.{name}": plain(w.shape) for name, w in theirs.named_parameters()}
    levels = len(ours.config.block_out_channels)
    found = {autoencoder_key(name, levels): plain(w.shape) for name, w in ours.state_dict().items()}
    assert found == wanted
    assert len(found) == len(ours.state_dict())


def plain(shape: torch.Size) -> tuple[int, ...]:
    """Attention over pixels is a 1x1 convolution there and a linear layer here."""
    return tuple(shape[:2]) if shape[2:] == (1, 1) else tuple(shape)


BLOCK = "model.diffusion_model.output_blocks.2.1.conv.weight"
AVERAGE = "model_ema.diffusion_modeltime_embed2bias"
STAGE = "first_stage_model.decoder.up.1.upsample.conv.bias"


@pytest.mark.parametrize("key", [BLOCK, AVERAGE, STAGE])
def test_a_missing_tensor_is_named(key, tmp_path):
    state = state_of("laion")
    del state[key]
    with pytest.raises(UserError, match=rf"1 keys missing \({re.escape(key)}\)"):
        read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")


@pytest.mark.parametrize("key", [f"{BLOCK}2", f"{AVERAGE}2", f"{STAGE}2", "optimizer.state"])
def test_a_left_over_tensor_is_named(key, tmp_path):
    state = state_of("laion") | {key: torch.zeros(1)}
    with pytest.raises(UserError, match=rf"1 keys left over \({re.escape(key)}\)"):
        read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")


@pytest.mark.parametrize("key", [BLOCK, AVERAGE, STAGE])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(key, tmp_path):
    state = state_of("laion")
    shape = tuple(state[key].shape)
    state[key] = torch.zeros(7, 3)
    message = rf"1 keys of another shape \({re.escape(key)} is \(7, 3\), wanted {re.escape(str(shape))}\)"
    with pytest.raises(UserError, match=message):
        read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")


def test_a_checkpoint_of_another_model_is_refused_with_its_first_differences(tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("laion"))
    with pytest.raises(UserError, match=r"\d+ keys missing \(.*; \.\.\.\), \d+ keys left over"):
        read(path, "laion", model={"layers": 1})


def test_what_the_original_keeps_beside_the_model_is_not_in_the_way(tmp_path):
    beside = ("cond_stage_model.transformer.weight", "retriever.retriever.model.positional_embedding")
    beside += ("first_stage_model.loss.logvar", "logvar", "unconditional_guidance_vex")
    bare = read(write_checkpoint(tmp_path / "bare.ckpt", state_of("imagenet")), "imagenet").unet
    state = state_of("imagenet") | {key: torch.zeros(2) for key in beside}
    weights = read(write_checkpoint(tmp_path / "model.ckpt", state), "imagenet").unet
    assert all(torch.equal(weights[name], bare[name]) for name in bare)


def test_half_precision_and_linear_projections_are_taken_as_they_are_meant(tmp_path):
    state = {key: tensor.half() for key, tensor in state_of("laion").items() if key != "betas"}
    for key, tensor in state.items():
        if key.endswith(("proj_inweight", "proj_outweight", "proj_in.weight")):
            state[key] = tensor.flatten(1)
    state["betas"] = state_of("laion")["betas"]
    released = read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")
    assert {weight.dtype for weight in released.unet.values()} == {torch.float32}
    wanted, found = outputs("laion", networks("laion")[1], opened(released, "laion"))
    assert (found - wanted).abs().max() < 0.05


def test_the_same_keys_as_safetensors_are_read(tmp_path):
    save_file(state_of("imagenet"), tmp_path / "model.safetensors")
    found = read(tmp_path / "model.safetensors", "imagenet").unet
    wanted = read(write_checkpoint(tmp_path / "model.ckpt", state_of("imagenet")), "imagenet").unet
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickled_object_is_refused_and_never_made(tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("laion"), extra=Bomb(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"holds a pickled .*which could run anything"):
        read(path, "laion")
    assert not (tmp_path / "ran").exists()


def test_what_lightning_leaves_beside_the_weights_is_harmless(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].ModelCheckpoint = callback
    left = {callback: {"best_model_score": np.float64(0.1), "dirpath": "logs"}}
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("laion"), callbacks=left)
    monkeypatch.undo()
    assert read(path, "laion").unet


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"diffusion": {"beta_end": 0.0195}}, "trained with 1000 betas from 0.0015 to 0.015, .* to 0.0195"),
        ({"diffusion": {"steps": 500}}, "trained with 1000 betas .* says 500"),
        ({"diffusion": {"prediction": "v_prediction"}}, "diffusion.prediction is 'v_prediction'"),
        ({"model": {"norm_groups": 16}}, "model.norm_groups is 16"),
        ({"autoencoder": {"kind": "vq"}}, "of kind 'kl', .* kind is 'vq'"),
    ],
)
def test_a_recipe_that_says_otherwise_than_the_checkpoint_is_refused(sections, words, tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("laion"))
    with pytest.raises(UserError, match=words):
        read(path, "laion", **sections)


@pytest.mark.parametrize("key", ["betas", "first_stage_model.quant_conv.weight"])
def test_a_checkpoint_without_its_schedule_or_first_stage_is_refused(key, tmp_path):
    state = state_of("laion")
    del state[key]
    with pytest.raises(UserError, match=f"has no {re.escape(key)}"):
        read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("imagenet"))
    torn = tmp_path / "torn.ckpt"
    for data in (path.read_bytes()[:5000], b"no checkpoint at all"):
        torn.write_bytes(data)
        with pytest.raises(UserError, match=r"no torch file, or torn"):
            read(torn, "imagenet")
    for pickled in (b"torn", b"\x80\x02}q\x00."):
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(torn, "w") as part:
            for name in whole.namelist():
                part.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
        with pytest.raises(UserError, match=r"no torch file, or torn|no state_dict of tensors"):
            read(torn, "imagenet")
    with pytest.raises(UserError, match="no state_dict of tensors"):
        read(write_checkpoint(tmp_path / "other.ckpt", {"betas": 3}), "imagenet")
    with pytest.raises(UserError, match="is not there"):
        read(tmp_path / "nowhere.ckpt", "imagenet")
    (tmp_path / "x.safetensors").write_bytes(b"no checkpoint at all")
    with pytest.raises(UserError, match="no safetensors file"):
        read(tmp_path / "x.safetensors", "imagenet")
