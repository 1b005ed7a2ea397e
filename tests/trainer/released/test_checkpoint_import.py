"""Import of released checkpoints: equal outputs and complete tensors."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from retrieval.errors import UserError
from tests.trainer.released import compvis
from tests.trainer.released.released_model import BETA_END, MODELS, networks, recipe_of, state_of, write_checkpoint
from trainer.model.autoencoder import Autoencoder, kl_f16, vq_f4
from trainer.model.recipe import ModelConfig
from trainer.model.unet import build_unet
from trainer.released.checkpoint_import import ReleasedModel, has_only_autoencoder, read_autoencoder, read_checkpoint
from trainer.released.tensor_names import autoencoder_key, average_key, unet_key

KINDS = sorted(MODELS)
PAPER = {
    "laion": (
        ModelConfig(latent_channels=16, context_dim=768, channels=(448, 896, 1344, 1792), attention=(1, 2, 4)),
        1_335_480_400,
    ),
    "imagenet": (
        ModelConfig(latent_channels=3, context_dim=512, channels=(192, 384, 576, 960), attention=(2, 4, 8)),
        400_920_579,
    ),
}


def read(path: Path, kind: str, **sections) -> ReleasedModel:
    recipe = recipe_of(kind, path.parent / "autoencoder", **sections)
    return read_checkpoint(path, recipe, path.parent / "imported")


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
    results = [unet(noisy, t, context) for unet in unets]
    return [result if isinstance(result, torch.Tensor) else result.sample for result in results]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().mean() > 0.1, "outputs near 0 would be equal for any network"
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_averaged_unet_gives_the_original_networks_outputs(kind, tmp_path):
    released = read(write_checkpoint(tmp_path / "model.ckpt", state_of(kind)), kind)
    unet, averaged, _ = networks(kind)
    expected, actual = outputs(kind, averaged, opened(released, kind))
    assert_same(actual, expected)
    assert (actual - outputs(kind, unet, averaged)[0]).abs().max() > 0.1, "the average must differ from the weights"


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_an_average_gives_its_weights(kind, tmp_path):
    unet, _, first_stage = networks(kind)
    state = compvis.checkpoint(unet, first_stage, BETA_END[kind])
    released = read(write_checkpoint(tmp_path / "model.ckpt", state), kind)
    assert_same(*reversed(outputs(kind, unet, opened(released, kind))))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_stage_gives_the_original_networks_latents_and_pictures(kind, tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of(kind))
    config = recipe_of(kind, read(path, kind).autoencoder).autoencoder
    autoencoder, original = Autoencoder.load(config, "cpu"), networks(kind)[2]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        moments = original.moments(images)
        assert_same(autoencoder.encode_moments(images) / config.scale, moments)
        latents = moments.chunk(2, dim=1)[0]
        # Values inside -1..1, where clipping does not hide a difference.
        pictures = original.decode(latents)
        decoded = autoencoder.decode(latents * config.scale)
    torch.testing.assert_close(decoded, pictures.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    assert (pictures.abs() < 1).float().mean() > 0.3


def first_stage_of(kind: str) -> dict[str, torch.Tensor]:
    """The state_dict of a file with the autoencoder alone, as published: bare names, and the tensors of its loss."""
    losses = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    return {**networks(kind)[2].state_dict(), **losses}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["bare", "prefixed", "whole"])
def test_the_autoencoder_alone_is_that_of_the_whole_model(kind, content, tmp_path):
    state = first_stage_of(kind)
    state = {
        "bare": state,
        "prefixed": {f"first_stage_model.{name}": tensor for name, tensor in state.items()},
        "whole": state_of(kind) | {"optimizer.unknown": torch.zeros(2)},
    }[content]
    path = write_checkpoint(tmp_path / "stage.ckpt", state)
    assert has_only_autoencoder(path) == (content != "whole")
    config = recipe_of(kind, tmp_path / "alone").autoencoder
    read_autoencoder(path, config, tmp_path / "alone")
    whole = read(write_checkpoint(tmp_path / "model.ckpt", state_of(kind)), kind).autoencoder
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "alone" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder.conv_in.weight": None},
            r"has no encoder\.conv_in\.weight: wanted a checkpoint with its first stage",
        ),
        ({"quant_conv.weight": None}, r"has no quant_conv\.weight"),
        ({"encoder.conv_in.weight": torch.zeros(())}, "0 channels at its first convolution"),
        ({"encoder.conv_in.weight": torch.zeros(48, 3, 3, 3)}, "48 channels at its first convolution"),
        ({"encoder.conv_in.weight": torch.zeros(8192, 1, 1, 1)}, "8192 channels at its first"),
        ({"quant_conv.weight": torch.zeros(0, 32, 1, 1)}, "0 at its last"),
        ({"decoder.conv_out.bias": None}, r"1 keys missing \(decoder\.conv_out\.bias\)"),
        ({"decoder.conv_out.bias": torch.zeros(4)}, r"decoder\.conv_out\.bias is \(4,\), wanted \(3,\)"),
        ({"encoder.spare": torch.zeros(1)}, r"1 keys unknown \(encoder\.spare\)"),
        ({"quantize.embedding.weight": torch.zeros(8, 3)}, "of kind 'vq', .* kind is 'kl'"),
        ({"quantize.embedding.weight": torch.zeros(())}, r"codes of shape \(\), wanted \(n, 3\)"),
        ({"quantize.embedding.weight": torch.zeros(0, 3)}, r"codes of shape \(0, 3\), wanted"),
    ],
)
def test_a_damaged_autoencoder_file_is_refused_with_its_first_differences(change, message, tmp_path):
    state = {name: tensor for name, tensor in (first_stage_of("laion") | change).items() if tensor is not None}
    path = write_checkpoint(tmp_path / "stage.ckpt", state)
    with pytest.raises(UserError, match=message):
        read_autoencoder(path, recipe_of("laion", tmp_path / "alone").autoencoder, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_papers_model_has_a_key_with_its_shape(kind):
    config, parameters = PAPER[kind]
    with torch.device("meta"):
        theirs, ours = compvis.UNetModel(config), build_unet(config)
    expected = {f"model.diffusion_model.{name}": w.shape for name, w in theirs.named_parameters()}
    keys = {name: unet_key(name, config) for name in ours.state_dict()}
    shapes = {keys[name]: weight.shape for name, weight in ours.state_dict().items()}
    assert shapes == expected
    assert len(keys) == len(shapes) == 688
    assert sum(shape.numel() for shape in shapes.values()) == parameters
    averaged = {average_key(key): shape for key, shape in shapes.items()}
    assert len(averaged) == len(shapes)
    with torch.device("meta"):
        state = compvis.average(theirs)
    assert averaged.keys() == state.keys() - {"model_ema.decay", "model_ema.num_updates"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_the_papers_autoencoder_has_a_key_with_its_shape(kind):
    with torch.device("meta"):
        theirs, ours = (compvis.Variational(128), kl_f16()) if kind == "laion" else (compvis.Quantized(128), vq_f4())
    expected = {f"first_stage_model.{name}": squeezed(w.shape) for name, w in theirs.named_parameters()}
    levels = len(ours.config.block_out_channels)
    shapes = {autoencoder_key(name, levels): squeezed(w.shape) for name, w in ours.state_dict().items()}
    assert shapes == expected
    assert len(shapes) == len(ours.state_dict())


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Attention over pixels has 1x1 convolutions in CompVis code and linear layers in diffusers."""
    return tuple(shape[:2]) if shape[2:] == (1, 1) else tuple(shape)


BLOCK = "model.diffusion_model.output_blocks.2.1.conv.weight"
AVERAGE = "model_ema.diffusion_modeltime_embed2bias"
STAGE = "first_stage_model.decoder.up.1.upsample.conv.bias"


def test_the_error_names_missing_tensors_of_each_network(tmp_path):
    state = {key: tensor for key, tensor in state_of("laion").items() if key not in (BLOCK, AVERAGE, STAGE)}
    with pytest.raises(UserError, match="3 keys missing") as error:
        read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")
    assert all(key in str(error.value) for key in (BLOCK, AVERAGE, STAGE))


@pytest.mark.parametrize("keys", [(f"{BLOCK}2", f"{AVERAGE}2", f"{STAGE}2"), ("optimizer.state",)])
def test_the_error_names_unknown_tensors_of_each_network_and_others(keys, tmp_path):
    state = state_of("laion") | {key: torch.zeros(1) for key in keys}
    with pytest.raises(UserError, match=rf"{len(keys)} keys unknown \({re.escape('; '.join(keys))}\)"):
        read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")


def test_the_error_names_tensors_of_another_shape_with_both_shapes(tmp_path):
    state = state_of("laion")
    shapes = {key: tuple(state[key].shape) for key in (BLOCK, AVERAGE, STAGE)}
    state |= {key: torch.zeros(7, 3) for key in shapes}
    with pytest.raises(UserError, match="3 keys of another shape") as error:
        read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")
    for key, shape in shapes.items():
        assert f"{key} is (7, 3), wanted {shape}" in str(error.value)


def test_a_checkpoint_of_another_model_is_refused_with_its_first_differences(tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("laion"))
    with pytest.raises(UserError, match=r"\d+ keys missing \(.*; \.\.\.\), \d+ keys unknown"):
        read(path, "laion", model={"layers": 1})


def test_other_parts_of_the_original_checkpoint_are_ignored(tmp_path):
    extra = ("cond_stage_model.transformer.weight", "retriever.retriever.model.positional_embedding")
    extra += ("first_stage_model.loss.logvar", "logvar", "unconditional_guidance_vex")
    bare = read(write_checkpoint(tmp_path / "bare.ckpt", state_of("imagenet")), "imagenet").unet
    state = state_of("imagenet") | {key: torch.zeros(2) for key in extra}
    weights = read(write_checkpoint(tmp_path / "model.ckpt", state), "imagenet").unet
    assert all(torch.equal(weights[name], bare[name]) for name in bare)


def test_half_precision_and_linear_projections_are_converted(tmp_path):
    state = {key: tensor.half() for key, tensor in state_of("laion").items() if key != "betas"}
    for key, tensor in state.items():
        if key.endswith(("proj_inweight", "proj_outweight", "proj_in.weight")):
            state[key] = tensor.flatten(1)
    state["betas"] = state_of("laion")["betas"]
    released = read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")
    assert {weight.dtype for weight in released.unet.values()} == {torch.float32}
    expected, actual = outputs("laion", networks("laion")[1], opened(released, "laion"))
    assert (actual - expected).abs().max() < 0.05


def test_a_safetensors_file_with_the_same_keys_is_read(tmp_path, monkeypatch):
    save_file(state_of("imagenet"), tmp_path / "model.safetensors")
    from_safetensors = read(tmp_path / "model.safetensors", "imagenet").unet
    from_torch = read(write_checkpoint(tmp_path / "model.ckpt", state_of("imagenet")), "imagenet").unet
    assert from_torch.keys() == from_safetensors.keys()
    assert all(torch.equal(tensor, from_safetensors[name]) for name, tensor in from_torch.items())
    save_file(first_stage_of("imagenet"), tmp_path / "stage.safetensors")
    monkeypatch.delattr("trainer.released.checkpoint_import.load_file")  # only names are read
    assert not has_only_autoencoder(tmp_path / "model.safetensors")
    assert has_only_autoencoder(tmp_path / "stage.safetensors")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"diffusion": {"beta_end": 0.0195}}, "trained with 1000 betas from 0.0015 to 0.015, .* to 0.0195"),
        ({"diffusion": {"steps": 500}}, "trained with 1000 betas .* has 500"),
        ({"diffusion": {"prediction": "v_prediction"}}, "diffusion.prediction is 'v_prediction'"),
        ({"model": {"norm_groups": 16}}, "model.norm_groups is 16"),
        ({"autoencoder": {"kind": "vq"}}, "of kind 'kl', .* kind is 'vq'"),
    ],
)
def test_a_recipe_with_other_settings_than_the_checkpoint_is_refused(sections, message, tmp_path):
    path = write_checkpoint(tmp_path / "model.ckpt", state_of("laion"))
    with pytest.raises(UserError, match=message):
        read(path, "laion", **sections)


@pytest.mark.parametrize("key", ["betas", "first_stage_model.quant_conv.weight"])
def test_a_checkpoint_without_its_schedule_or_first_stage_is_refused(key, tmp_path):
    state = state_of("laion")
    del state[key]
    with pytest.raises(UserError, match=f"has no {re.escape(key)}"):
        read(write_checkpoint(tmp_path / "model.ckpt", state), "laion")
