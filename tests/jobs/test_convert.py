"""`python -m jobs.convert`: a released model becomes the recipe's run, and a run a folder for diffusers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel

from jobs.convert import main
from tests.trainer.released.released_model import recipe_of, state_of, write_checkpoint
from tests.trainer.tiny_run import write_clip


def toml(sections: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
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


def test_an_error_ends_the_command_with_code_2_and_its_message(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = recipe.parent / "torn.ckpt"
    torn.write_bytes(b"torn")
    for options, message in (
        (["--from", str(torn), "--set", "train.name=other"], f"error: {torn} is not a torch file"),
        (["--to", str(recipe.parent / "x"), "--set", "train.name=none"], "error: .*none/train"),
        ([], "one of the arguments --from --to is required"),
    ):
        with pytest.raises(SystemExit) as error:
            main([str(recipe), *options])
        assert error.value.code == 2
        assert re.search(message, capsys.readouterr().err)
