import tomllib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from retrieval.errors import UserError
from retrieval.storage.manifest import fingerprint
from tests.trainer.training_set import make_recipe
from trainer.engine.deepspeed_engine import Ranks, engine_settings
from trainer.model.recipe import ModelConfig
from trainer.model.unet import build_unet
from trainer.recipe import LatentsConfig, TrainingRecipe

RECIPES = Path(__file__).parents[2] / "jobs" / "configs"
# Paper Table 1: parameters, images per step, steps, k.
PAPER = {
    "train_laion_256": (1_335_480_400, 1600, 275_000, 8),
    "train_laion_512": (1_335_480_400, 800, 225_000, 8),
    "train_laion_768": (1_335_480_400, 432, 270_000, 8),
    "train_imagenet": (400_920_579, 1240, 112_000, 4),
}


# First and last beta, scale and channels of the latents, dimension of an embedding.
PAPER_SPACES = dict.fromkeys(PAPER, (0.0015, 0.015, 0.22765929, 16, 768))
PAPER_SPACES["train_imagenet"] = (0.0015, 0.0195, 1.0, 3, 512)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_the_papers_numbers(name: str) -> None:
    text = (RECIPES / f"{name}.toml").read_text()
    sections = tomllib.loads(text)
    recipe = TrainingRecipe.model_validate({name: sections[name] for name in TrainingRecipe.model_fields})
    with torch.device("meta"):
        unet = build_unet(recipe.model)
    parameters = sum(weight.numel() for weight in unet.parameters())
    train = recipe.train
    assert (parameters, train.global_batch, train.steps, train.k) == PAPER[name]
    assert train.learning_rate == 1e-4
    diffusion, model = recipe.diffusion, recipe.model
    spaces = (recipe.autoencoder.scale, model.latent_channels, model.context_dim)
    assert (diffusion.beta_start, diffusion.beta_end, *spaces) == PAPER_SPACES[name]
    assert (diffusion.steps, diffusion.prediction) == (1000, "epsilon")
    settings = engine_settings(train, Ranks(0, 8, torch.device("cuda")))
    assert settings["gradient_accumulation_steps"] * settings["train_micro_batch_size_per_gpu"] * 8 == PAPER[name][1]
    latents = LatentsConfig.model_validate(sections["latents"])
    assert (train.source, latents.size, latents.gpus_per_worker) == ("latents", train.size, 1)
    edge = train.size // {"kl": 16, "vq": 4}[recipe.autoencoder.kind]
    assert f"{latents.views * 2 * 2 * model.latent_channels * edge**2:,} bytes an image" in text
    # Each of 8 ranks opens only its part of the shards.
    assert (train.interleaved_shards % 8, train.global_batch % train.interleaved_shards) == (0, 0)


def test_only_the_imagenet_models_take_clip_vectors_at_their_own_length() -> None:
    norms = {}
    for path in sorted(RECIPES.glob("*.toml")):
        if model := tomllib.loads(path.read_text()).get("model"):
            norms[path.stem] = ModelConfig.model_validate(model).context_norm
    assert len(norms) > 6
    assert norms == {name: "raw" if "imagenet" in name else "unit" for name in norms}


def test_speed_settings_do_not_change_what_is_trained() -> None:
    changed = {"micro_batch": 4, "workers": 7, "checkpoint_every": 9, "log_every": 3, "ranks": 2}
    assert make_recipe("", **changed).output_fields() == make_recipe("").output_fields()
    assert make_recipe("", seed=9).output_fields() != make_recipe("").output_fields()


def test_settings_added_later_leave_fingerprints_and_stored_recipes_as_they_were() -> None:
    recipe = make_recipe("")
    fields = recipe.output_fields()
    assert fingerprint("train", 0, recipe, {}) == "3063b0bd7f8ef78a"
    added = {"learning_rate_decay", "adam_eps", "min_snr_gamma", "zero_terminal_snr", "ema_widths"}
    assert not added & (fields["train"].keys() | fields["diffusion"].keys())
    assert make_recipe("", min_snr_gamma=5.0).output_fields()["train"]["min_snr_gamma"] == 5


def test_min_snr_weights_and_zero_terminal_snr_exclude_each_other() -> None:
    sections = make_recipe("", min_snr_gamma=5.0).model_dump()
    sections["diffusion"] |= {"prediction": "v_prediction", "zero_terminal_snr": True}
    with pytest.raises(ValidationError, match="the weight 0: use one of them"):
        TrainingRecipe.model_validate(sections)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "bf16", "zero_stage": 0}, "zero_stage 0"),
        ({"micro_batch": 3}, "multiple of micro_batch"),
        ({"keep_every": 3}, "multiple of checkpoint_every"),
        ({"name": "../elsewhere"}, "pattern"),
        ({"p_uncond": 1.5}, "less than or equal to 1"),
        ({"k": 0}, "greater than 0"),
        ({"timestep_sampling": "density"}, "need each other"),
        ({"timestep_density": [1, 2]}, "need each other"),
        ({"timestep_sampling": "density", "timestep_density": [0]}, "need each other"),
        ({"adam_beta2": 1.0}, "less than 1"),
        ({"ema_widths": [0.1, 0.3]}, "less than or equal to 0.288"),
        ({"ema_widths": [0.05, 0.1, 0.05]}, "must differ in their first 6 digits"),
        ({"ema_widths": [0.1, 0.10000001]}, "must differ in their first 6 digits"),
        ({"learning_rat": 1e-4}, "Extra inputs"),
    ],
)
def test_invalid_settings_are_an_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_recipe("", **change)


def test_a_batch_that_cannot_be_split_over_the_ranks_is_an_error() -> None:
    message = "batch 8 cannot be split over 3 ranks .* to a multiple of 3 such as 9 and train.micro_batch to 1, or"
    with pytest.raises(UserError, match=message):
        engine_settings(make_recipe("").train, Ranks(0, 3, torch.device("cpu")))
    with pytest.raises(UserError, match=r"over 8 ranks in micro batches of 2: set train\.micro_batch to 1, or"):
        engine_settings(make_recipe("").train, Ranks(0, 8, torch.device("cpu")))
