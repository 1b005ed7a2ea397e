"""One prompt to one PNG from the shell, without the stage."""

import json
from pathlib import Path

import pytest
from PIL import Image

from jobs import sample
from jobs.cli.recipe import load_recipe
from tests.trainer.tiny_run import pictures_of, write_run
from trainer.sampling.picture import png_bytes, read_recipe
from trainer.sampling.recipe import SampleConfig

TRAIN = 'name = "tiny"\nsource = "latents"\nsize = 32\nk = 4\nglobal_batch = 1\nmicro_batch = 1\nsteps = 1\n'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a trained model; its [sample] names a prompt and a database."""
    folder = tmp_path_factory.mktemp("one")
    root, trained = write_run(folder)
    path = folder / "recipe.toml"
    path.write_text(
        f'root = "{root.url}"\n[clip]\nmodel = "{trained.clip.model}"\n'
        f'[autoencoder]\nkind = "patch"\npath = "{trained.autoencoder.path}"\n[train]\n{TRAIN}'
        '[sample]\nprompts = ["a star"]\ndatabases = ["green"]\nsteps = 2\nk = 4\nguidance = 2.0\nseed = 7\n'
        'device = "cpu"\n'
    )
    return path


def test_a_prompt_becomes_one_picture_and_the_stage_is_left_alone(recipe, tmp_path, capsys):
    out = tmp_path / "stag.png"
    sample.main([str(recipe), "--prompt", 'a "stag" 🦌', "--out", str(out)])
    found = read_recipe(out.read_bytes())
    assert (found["prompt"], found["database"], found["seed"]) == ('a "stag" 🦌', "green", 7)
    assert Image.open(out).size == (32, 32)
    assert not (recipe.parent / "root/runs/tiny/sample").exists()
    assert f"{out}: 32 x 32, 4 neighbors from 'green'" in capsys.readouterr().out


def test_database_seed_and_size_may_be_named(recipe, tmp_path):
    out = tmp_path / "stag.png"
    words = ["--prompt", "a stag", "--out", str(out), "--database", "deep_red", "--seed", "3"]
    sample.main([str(recipe), *words, "--set", "sample.width=48"])
    found = read_recipe(out.read_bytes())
    assert (found["database"], found["seed"], Image.open(out).size) == ("deep_red", 3, (48, 32))


def test_the_short_options_change_the_stage_as_set_does(recipe):
    line = '--database we"ird --seed 4 --mix green=2 a.b=0.5 --exclude -3 7 --weigh=-3=2 --image a.png'
    more = ["--top-m", "0.1", "--mode", "neighbors"]
    words = sample.overrides(sample.arguments_of([str(recipe), *line.split(), *more]))
    config = load_recipe(recipe, words)[SampleConfig]
    assert (config.databases, config.seed, config.k) == (('we"ird',), 4, 4)
    assert config.mix == {"green": 2.0, "a.b": 0.5}
    assert (config.exclude, config.weights, config.images) == ((-3, 7), {-3: 2.0}, ("a.png",))
    assert (config.mode, config.top_m) == ("neighbors", 0.1)
    assert json.loads(config.model_dump_json())["prompts"] == ["a star"]


def test_a_picture_of_a_mix_and_an_image_is_made_again_from_its_png(recipe, tmp_path, capsys):
    out, again, image = tmp_path / "first.png", tmp_path / "again.png", tmp_path / "image.png"
    pictures_of("sky_blue")[0].save(image)
    words = ["--prompt", "a stag", "--image", str(image), "--mix", "green=2", "deep_red=1"]
    sample.main([str(recipe), *words, "--out", str(out)])
    assert "8 neighbors from 'green', 'deep_red'" in capsys.readouterr().out
    image.unlink()
    sample.main([str(recipe), "--again", str(out), "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()
    found = read_recipe(out.read_bytes())
    for changed, told in (
        ({"model": "another"}, "made with another model"),
        ({"neighbors": found["neighbors"][::-1]}, "the databases have changed"),
    ):
        out.write_bytes(png_bytes(Image.open(again), found | changed))
        with pytest.raises(SystemExit):
            sample.main([str(recipe), "--again", str(out)])
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mix", "green"], "wanted words such as neon=2"),
        (["--prompt", "a", "--image", "nowhere.png"], "'nowhere.png' cannot be read"),
        (["--again", "nowhere.png"], "wanted a picture that sample made"),
        (["--prompt", "a", "--mode", "unconditional"], "neighbors"),
    ],
)
def test_what_cannot_be_done_is_told(recipe, words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.main([str(recipe), *words])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("out", ["stag.jpg", "nowhere/stag.png"])
def test_a_place_that_cannot_take_a_png_is_refused_before_any_work(recipe, tmp_path, out, capsys):
    with pytest.raises(SystemExit) as ended:
        sample.main([str(recipe), "--prompt", "a stag", "--out", str(tmp_path / out)])
    assert ended.value.code == 2
    assert "a file that ends in .png, in a folder that is there" in capsys.readouterr().err
