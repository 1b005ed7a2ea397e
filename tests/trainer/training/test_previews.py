from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from tests.trainer.tiny_run import DIM, PROMPTS, tiny_autoencoder, write_clip
from tests.trainer.training_set import make_recipe
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import DiffusionConfig, ModelConfig
from trainer.model.unet import build_unet
from trainer.training.previews import Drawer, Previews, Prompts, encode_prompts
from trainer.training.validation import HeldOut

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    return Autoencoder.load(tiny_autoencoder(tmp_path_factory.mktemp("autoencoder")), "cpu")


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    shape = {"channels": (32, 32), "attention": (1, 2), "layers": 1, "norm_groups": 8, "context_gain": 50.0}
    torch.manual_seed(0)
    return build_unet(ModelConfig(latent_channels=4, context_dim=DIM, **shape)).requires_grad_(False)


def images(context_seed: int = 0) -> HeldOut:
    generator = torch.Generator().manual_seed(1)
    return HeldOut(
        image_ids=np.array([-3, 5]),
        moments=torch.randn(2, 8, 8, 8, generator=generator).half(),
        context=torch.randn(2, 4, DIM, generator=generator.manual_seed(context_seed)).half(),
    )


def pixels(autoencoder: Autoencoder, unet: torch.nn.Module, held_out: HeldOut, prompts: Prompts | None) -> np.ndarray:
    previews = Previews(held_out, prompts, Drawer(autoencoder, DiffusionConfig(), CPU))
    return np.asarray(previews.draw(unet, 7))


def test_a_sheet_is_reproducible_and_depends_on_the_neighbors(autoencoder: Autoencoder, unet: torch.nn.Module) -> None:
    sheet = pixels(autoencoder, unet, images(), None)
    assert np.array_equal(sheet, pixels(autoencoder, unet, images(), None))
    other = pixels(autoencoder, unet, images(context_seed=9), None)
    # The first row has the same held-out images, the second has other samples.
    middle = sheet.shape[0] - 160
    assert np.array_equal(sheet[: middle - 10], other[: middle - 10])
    assert (sheet[middle:] != other[middle:]).any()


def test_samples_of_prompts_are_below_and_depend_on_the_prompt(
    autoencoder: Autoencoder, unet: torch.nn.Module, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "clip")
    encoder = Encoder(clip)
    prompts = encode_prompts(PROMPTS, clip, encoder.identity.model_dump())
    torch.testing.assert_close(prompts.context[:, 0], torch.from_numpy(encoder.encode_texts(PROMPTS)))
    without_prompts = pixels(autoencoder, unet, images(), None)
    with_prompts = pixels(autoencoder, unet, images(), prompts)
    assert np.array_equal(with_prompts[: len(without_prompts), : without_prompts.shape[1]], without_prompts)
    assert len(with_prompts) > len(without_prompts) + 160
    reworded = encode_prompts(("another thing", *PROMPTS[1:]), clip, encoder.identity.model_dump())
    other = pixels(autoencoder, unet, images(), reworded)
    assert (other[len(without_prompts) :] != with_prompts[len(without_prompts) :]).any()


def test_weights_in_bf16_draw_nearly_the_same_sheet(autoencoder: Autoencoder, unet: torch.nn.Module) -> None:
    sheet = pixels(autoencoder, unet, images(), None).astype(float)
    half = build_unet(
        ModelConfig(latent_channels=4, context_dim=DIM, channels=(32, 32), attention=(1, 2), layers=1, norm_groups=8)
    )
    half.load_state_dict(unet.state_dict())
    difference = np.abs(pixels(autoencoder, half.type(torch.bfloat16), images(), None) - sheet)
    assert 0 < difference.mean() < 8


def test_prompts_need_the_encoder_of_the_neighbors(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    other = Encoder(write_clip(tmp_path / "other", seed=1))
    with pytest.raises(UserError, match=r"the neighbors have encoder other .* \[clip\] is clip"):
        encode_prompts(PROMPTS, clip, other.identity.model_dump())
    with pytest.raises(ValidationError, match=r"train.preview_prompts and train.kid_every need a section clip"):
        make_recipe("", validation_images=8, preview_every=2, preview_prompts=PROMPTS)
    with pytest.raises(ValidationError, match=r"train.kid_every need a section clip"):
        make_recipe("", validation_images=8, kid_every=2)
