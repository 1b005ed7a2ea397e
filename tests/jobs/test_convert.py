"""`python -m jobs.convert`: a released model becomes the recipe's run, and a run a folder for diffusers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel

from jobs.convert import main
from tests.trainer.released.released_model import networks, recipe_of, state_of, write_checkpoint
from tests.trainer.tiny_run import write_clip
from trainer.model.autoencoder import Autoencoder


def toml(sections: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None)]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of the small ImageNet model with an encoder; the checkpoint is in the same folder."""
    folder = tmp_path_factory.mktemp("convert")
    sections = recipe_of("imagenet", folder / "autoencoder").model_dump(mode="json")
    sections["clip"] = write_clip(folder / "clip").model_dump()
    path = folder / "recipe.toml"
    path.write_text(f'root = "{folder / "root"}"\n{toml(sections)}\n')
    write_checkpoint(folder / "model.ckpt", state_of("imagenet"))
    return path


def test_a_checkpoint_is_imported_as_a_run_and_exported_as_a_diffusers_folder(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recipe.parent
    main([str(recipe), "--from", str(folder / "model.ckpt")])
    assert "model.ckpt as " in capsys.readouterr().err
    assert (folder / "root/runs/imagenet/train/manifest.json").is_file()
    main([str(recipe), "--to", str(folder / "shared")])
    for kind, part in ((UNet2DConditionModel, "unet"), (VQModel, "vae"), (DDIMScheduler, "scheduler")):
        assert kind.from_pretrained(folder / "shared", subfolder=part)


def test_the_autoencoder_alone_is_recognized_and_training_can_load_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without [clip] and [train], which an autoencoder does not need."""
    folder, config = recipe.parent, recipe_of("imagenet", recipe.parent / "alone")
    short = folder / "short.toml"
    sections = config.model_dump(mode="json", include={"autoencoder", "model"})
    short.write_text(f'root = "{folder / "other"}"\n{toml(sections)}\n')
    write_checkpoint(folder / "stage.ckpt", networks("imagenet")[2].state_dict())
    identities = set()
    for options in (["--from", str(folder / "stage.ckpt")], ["--from", str(folder / "model.ckpt"), "--autoencoder"]):
        main([str(short), *options])
        assert "kind vq, factor 4, 3 channels" in capsys.readouterr().err
        identities.add(Autoencoder.load(config.autoencoder, "cpu").identity)
        shutil.rmtree(folder / "alone")
    assert len(identities) == 1
    assert not (folder / "other").exists()
    with pytest.raises(SystemExit):
        main([str(short), "--from", str(folder / "stage.ckpt"), "--set", "model.latent_channels=4"])
    assert "latents have 3 channels, [model] latent_channels is 4" in capsys.readouterr().err


def test_an_error_ends_the_command_with_code_2_and_its_message(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = recipe.parent / "torn.ckpt"
    torn.write_bytes(b"torn")
    for options, message in (
        (["--from", str(torn), "--set", "train.name=other"], f"error: {torn} is not a torch file"),
        (["--to", str(recipe.parent / "x"), "--set", "train.name=none"], "error: .*none/train"),
        (["--ema-width", "0.1"], "neighbors/manifest.json is missing"),
        (["--to", str(recipe.parent / "x"), "--autoencoder"], "use it with --from"),
        ([], "one of the arguments --from --to --ema-width is required"),
    ):
        with pytest.raises(SystemExit) as error:
            main([str(recipe), *options])
        assert error.value.code == 2
        assert re.search(message, capsys.readouterr().err)
