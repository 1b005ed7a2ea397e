"""Three kinds of autoencoder with one interface, and the errors for damaged folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrieval.errors import UserError
from trainer.model import autoencoder as autoencoder_module
from trainer.model.autoencoder import Autoencoder, draw_latents, encode_in_bf16, kl_f16, vq_f4
from trainer.model.patch_autoencoder import WEIGHTS_NAME, PatchAutoencoder, PatchShape
from trainer.model.recipe import AutoencoderConfig

KINDS = {"kl": (16, 4), "vq": (4, 3), "patch": (4, 4)}


def write(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a small model with random weights."""
    torch.manual_seed(seed)
    if kind == "patch":
        network = PatchAutoencoder(PatchShape(hidden=8))
        network.fit_components(images())
        network.save(folder)
    else:
        network = kl_f16(8, 4, 4) if kind == "kl" else vq_f4(8, 16, 4)
        network.save_pretrained(folder, safe_serialization=True)
    return folder


def load(kind: str, folder: Path, scale: float = 1.0) -> Autoencoder:
    return Autoencoder.load(AutoencoderConfig(kind=kind, path=str(folder), scale=scale), "cpu")


def images(count: int = 2, side: int = 64) -> torch.Tensor:
    """Smooth random images in [-1, 1]."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.tanh(torch.nn.functional.interpolate(noise, (side, side), mode="bicubic"))


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_encoded_to_moments_and_latents_are_decoded_to_images(kind, tmp_path):
    autoencoder = load(kind, write(kind, tmp_path))
    factor, channels = KINDS[kind]
    assert (autoencoder.factor, autoencoder.channels) == (factor, channels)
    moments = autoencoder.encode_moments(images())
    assert moments.shape == (2, 2 * channels, 64 // factor, 64 // factor)
    latents = draw_latents(moments, torch.randn(2, channels, 64 // factor, 64 // factor))
    decoded = autoencoder.decode(latents)
    assert decoded.shape == (2, 3, 64, 64)
    assert decoded.abs().max() <= 1
    assert not decoded.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_scale_multiplies_moments_and_decoding_divides_by_it(kind, tmp_path):
    write(kind, tmp_path)
    plain, scaled = load(kind, tmp_path), load(kind, tmp_path, scale=0.25)
    moments = plain.encode_moments(images())
    assert torch.allclose(scaled.encode_moments(images()), moments * 0.25, atol=1e-6)
    latents = moments.chunk(2, dim=1)[0]
    assert torch.allclose(scaled.decode(latents * 0.25), plain.decode(latents), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kl_kind_has_a_standard_deviation(kind, tmp_path):
    moments = load(kind, write(kind, tmp_path)).encode_moments(images())
    deviation = moments.chunk(2, dim=1)[1]
    assert bool((deviation > 0).all()) == (kind == "kl")


@pytest.mark.parametrize("kind", KINDS)
def test_many_images_are_encoded_in_slices_to_the_same_moments(kind, tmp_path, monkeypatch):
    autoencoder = load(kind, write(kind, tmp_path))
    whole = autoencoder.encode_moments(images(5))
    monkeypatch.setattr(autoencoder_module, "PIXELS_AT_ONCE", 2 * 64 * 64)
    counts = []
    encode = autoencoder._network.encode
    monkeypatch.setattr(autoencoder._network, "encode", lambda part: counts.append(len(part)) or encode(part))
    torch.testing.assert_close(autoencoder.encode_moments(images(5)), whole, rtol=1e-4, atol=1e-5)
    assert counts == [2, 2, 1]


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_an_encoder_in_bf16_gives_nearly_the_same_float32_moments(kind, tmp_path):
    folder = write(kind, tmp_path)
    autoencoder, lower = load(kind, folder), load(kind, folder)
    encode_in_bf16(lower._network)
    expected, moments = autoencoder.encode_moments(images()), lower.encode_moments(images())
    assert moments.dtype == torch.float32
    assert 0 < (moments - expected).norm() / expected.norm() < 0.02
    latents = expected.chunk(2, dim=1)[0]
    assert torch.equal(autoencoder.decode(latents), lower.decode(latents))


def test_images_are_encoded_on_the_device_of_the_network(tmp_path):
    folder = write("kl", tmp_path)
    autoencoder = Autoencoder.load(AutoencoderConfig(kind="kl", path=str(folder)), "meta")
    assert autoencoder.encode_moments(images()).device.type == "meta"


def test_a_drawn_latent_is_mean_plus_deviation_times_noise():
    moments = torch.cat([torch.full((1, 4, 4, 4), 3.0), torch.full((1, 4, 4, 4), 0.5)], dim=1)
    assert torch.equal(draw_latents(moments, torch.full((1, 4, 4, 4), 2.0)), torch.full((1, 4, 4, 4), 4.0))


def test_the_vq_kind_encodes_without_and_decodes_with_quantization(tmp_path):
    autoencoder = load("vq", write("vq", tmp_path))
    codes = load_file(tmp_path / WEIGHTS_NAME)["quantize.embedding.weight"]
    mean = autoencoder.encode_moments(images()).chunk(2, dim=1)[0]
    distances = torch.cdist(mean.movedim(1, -1).flatten(0, -2), codes)
    assert distances.min(dim=1).values.mean() > 1e-3
    code = codes[0].view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert torch.equal(autoencoder.decode(code), autoencoder.decode(code + 1e-6))


def test_identity_depends_on_weights_settings_and_scale(tmp_path):
    first, second = write("patch", tmp_path / "first"), write("patch", tmp_path / "second", seed=1)
    assert load("patch", first).identity == load("patch", first).identity
    assert load("patch", first).identity != load("patch", second).identity
    assert load("patch", first).identity != load("patch", first, scale=2.0).identity
    folder = write("vq", tmp_path / "vq")
    before = load("vq", folder).identity
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"_diffusers_version": "0.0.1"}))
    assert load("vq", folder).identity == before
    (folder / "config.json").write_text(json.dumps(settings | {"act_fn": "relu"}))
    assert load("vq", folder).identity != before


def test_the_production_autoencoders_have_the_papers_shapes():
    with torch.device("meta"):
        kl, vq = kl_f16(), vq_f4()
    assert kl.config.block_out_channels == (128, 128, 256, 256, 512)
    assert kl.config.latent_channels == 16
    assert vq.quantize.embedding.weight.shape == (8192, 3)
    assert vq.config.block_out_channels == (128, 256, 512)


def test_principal_components_alone_reconstruct_smooth_images():
    network = PatchAutoencoder(PatchShape(channels=12, hidden=8))
    network.fit_components(images(8))
    with torch.no_grad():
        error = (network.decode(network.encode(images(8))) - images(8)).square().mean()
    assert error < 1e-3


def test_latents_of_the_principal_components_have_unit_variance_in_each_channel():
    network = PatchAutoencoder(PatchShape(hidden=8))
    network.fit_components(images(8))
    with torch.no_grad():
        latents = network.encode(images(8))
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-2)
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)


def test_the_error_for_a_missing_folder_names_the_setting(tmp_path):
    with pytest.raises(UserError, match=r"config.json is missing.*Set it to"):
        load("kl", tmp_path / "nowhere")


def test_the_error_for_another_kind_names_both_kinds(tmp_path):
    with pytest.raises(UserError, match=r"describes a VQModel, .* needs a AutoencoderKL"):
        load("kl", write("vq", tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_missing_unexpected_and_reshaped_tensors_are_named(kind, tmp_path):
    weights = load_file(write(kind, tmp_path) / WEIGHTS_NAME)
    first, second = sorted(weights)[:2]
    del weights[first]
    weights[second] = torch.zeros(1, 2, 3)
    weights["stranger"] = torch.zeros(1)
    save_file(weights, tmp_path / WEIGHTS_NAME)
    message = rf"1 tensors missing \({first}\); 1 tensors unexpected \(stranger\); .*shape \({second}\)"
    with pytest.raises(UserError, match=message):
        load(kind, tmp_path)


def test_pickled_weights_are_an_error(tmp_path):
    network = kl_f16(8, 4, 4)
    network.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match="must be in safetensors format"):
        load("kl", tmp_path)


def test_a_truncated_weights_file_and_a_damaged_config_are_errors(tmp_path):
    path = write("patch", tmp_path) / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a safetensors file"):
        load("patch", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "PatchAutoencoder", "factor": "four"}))
    with pytest.raises(UserError, match="does not describe a PatchAutoencoder"):
        load("patch", tmp_path)
