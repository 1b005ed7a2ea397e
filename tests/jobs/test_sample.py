"""`laion-rdm sample` with --prompt and --again: one picture without the stage."""

import json
from pathlib import Path

import pytest
from PIL import Image

from jobs import sample
from jobs.cli.recipe import load_recipe
from retrieval import Database
from retrieval.cli import commands
from tests.trainer.tiny_run import pictures_of, write_run
from trainer.sampling.picture import png_bytes, read_recipe
from trainer.sampling.recipe import SampleConfig

TRAIN = 'name = "tiny"\nsource = "latents"\nsize = 32\nk = 4\nglobal_batch = 1\nmicro_batch = 1\nsteps = 1\n'


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of a trained model; [sample] has a prompt and a database."""
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


def test_a_prompt_gives_one_picture_and_no_stage(recipe, tmp_path, capsys):
    out = tmp_path / "stag.png"
    sample.main([str(recipe), "--prompt", 'a "stag" 🦌', "--out", str(out)])
    stored = read_recipe(out.read_bytes())
    assert (stored["prompt"], stored["database"], stored["seed"]) == ('a "stag" 🦌', "green", 7)
    assert Image.open(out).size == (32, 32)
    assert not (recipe.parent / "root/runs/tiny/sample").exists()
    assert f"{out}: 32 x 32, 4 neighbors from 'green'" in capsys.readouterr().out


def test_database_seed_and_size_are_options(recipe, tmp_path):
    out = tmp_path / "stag.png"
    options = ["--prompt", "a stag", "--out", str(out), "--database", "deep_red", "--seed", "3"]
    sample.main([str(recipe), *options, "--set", "sample.width=48"])
    stored = read_recipe(out.read_bytes())
    assert (stored["database"], stored["seed"], Image.open(out).size) == ("deep_red", 3, (48, 32))


def test_short_options_have_the_effect_of_set(recipe):
    line = '--database we"ird --seed 4 --mix green=2 a.b=0.5 --exclude -3 7 --weigh=-3=2 --image a.png'
    more = ["--top-m", "0.1", "--mode", "neighbors", "--init-image", "b.png", "--strength", "0.4", "--mask", "c.png"]
    overrides = sample.overrides(sample.parse_arguments([str(recipe), *line.split(), *more]))
    config = load_recipe(recipe, overrides)[SampleConfig]
    assert (config.databases, config.seed, config.k) == (('we"ird',), 4, 4)
    assert config.mix == {"green": 2.0, "a.b": 0.5}
    assert (config.exclude, config.weights, config.images) == ((-3, 7), {-3: 2.0}, ("a.png",))
    assert (config.mode, config.top_m) == ("neighbors", 0.1)
    assert (config.init_image, config.strength, config.mask) == ("b.png", 0.4, "c.png")
    assert json.loads(config.model_dump_json())["prompts"] == ["a star"]


def test_a_picture_of_a_mix_and_an_image_is_reproduced_from_its_png(recipe, tmp_path, capsys):
    out, again, image = tmp_path / "first.png", tmp_path / "again.png", tmp_path / "image.png"
    pictures_of("sky_blue")[0].save(image)
    options = ["--prompt", "a stag", "--image", str(image), "--mix", "green=2", "deep_red=1"]
    sample.main([str(recipe), *options, "--out", str(out)])
    assert "8 neighbors from 'green', 'deep_red'" in capsys.readouterr().out
    image.unlink()
    sample.main([str(recipe), "--again", str(out), "--out", str(again)])
    assert again.read_bytes() == out.read_bytes()
    stored = read_recipe(out.read_bytes())
    for changed, message in (
        ({"model": "another"}, "the recipe has another model"),
        ({"neighbors": stored["neighbors"][::-1]}, "the databases have changed"),
        ({"neighbors": [3]}, "field neighbors is [3], wanted pairs of id and similarity"),
        ({"precision": ["fp32"]}, "field precision is ['fp32'], wanted 'bf16' or 'fp32'"),
        ({"seed": "3"}, "field seed is '3'. Input should be a valid integer"),
    ):
        out.write_bytes(png_bytes(Image.open(again), stored | changed))
        with pytest.raises(SystemExit):
            sample.main([str(recipe), "--again", str(out)])
        assert message in capsys.readouterr().err


def test_a_picture_is_drawn_again_without_a_group_of_neighbors(recipe, tmp_path, capsys):
    out, without, again = tmp_path / "first.png", tmp_path / "without.png", tmp_path / "again.png"
    sample.main([str(recipe), "--prompt", "a stag", "--out", str(out)])
    best = read_recipe(out.read_bytes())["neighbors"][0][0]
    capsys.readouterr()
    group = ["--without", f"image_id in [{best}]"]
    sample.main([str(recipe), "--again", str(out), "--out", str(without), *group])
    text = capsys.readouterr().out
    assert f"without the rows where image_id in [{best}]: CLIP similarity to the picture with them" in text
    left_out, in_their_place = text.partition("1 neighbors only in the picture with them")[2].split(
        "1 neighbors only in the picture without"
    )
    assert str(best) in left_out
    assert "caption of green-" in in_their_place
    assert best not in [image_id for image_id, _ in read_recipe(without.read_bytes())["neighbors"]]
    sample.main([str(recipe), "--again", str(without), "--out", str(again)])
    assert again.read_bytes() == without.read_bytes()
    sample.main([str(recipe), "--prompt", "a stag", "--out", str(again), *group])
    assert again.read_bytes() == without.read_bytes()


def test_the_condition_of_the_recipe_holds_for_new_pictures_and_compares_nothing(recipe, tmp_path, capsys):
    out, without, again = tmp_path / "first.png", tmp_path / "without.png", tmp_path / "again.png"
    sample.main([str(recipe), "--prompt", "a stag", "--out", str(out)])
    best = read_recipe(out.read_bytes())["neighbors"][0][0]
    conditional = [str(recipe), "--set", f"sample.without='image_id == {best}'"]
    sample.main([*conditional, "--prompt", "a stag", "--out", str(without)])
    stored = read_recipe(without.read_bytes())
    assert stored["without"] == f"image_id == {best}"
    assert best not in [image_id for image_id, _ in stored["neighbors"]]
    for picture in (out, without):
        sample.main([*conditional, "--again", str(picture), "--out", str(again)])
        assert again.read_bytes() == picture.read_bytes()
    assert "CLIP similarity" not in capsys.readouterr().out


def test_a_signed_picture_is_verified_from_the_shell_and_reproduced(recipe, tmp_path, capsys):
    out, again = tmp_path / "stag.png", tmp_path / "again.png"
    signed = ["--set", "sample.certificate=demo"]
    sample.main([str(recipe), "--prompt", "a stag", "--out", str(out), *signed])
    capsys.readouterr()
    assert commands.main(["verify", str(out)]) == 0
    text = capsys.readouterr().out
    assert "unchanged since it was signed" in text
    assert "no authority confirms it" in text
    stored = read_recipe(out.read_bytes())
    identity = Database.open(f"{recipe.parent}/root/databases/green").manifest.identity
    assert f"model: {stored['model']}" in text
    assert f"databases: {{'green': '{identity}'}}" in text
    for image_id, similarity in stored["neighbors"]:
        assert f"{similarity:.3f}  green  {image_id}" in text
    sample.main([str(recipe), "--again", str(out), "--out", str(again)])
    assert Image.open(again).tobytes() == Image.open(out).tobytes()
    capsys.readouterr()
    assert commands.main(["verify", str(again)]) == 1
    assert "no signed statement" in capsys.readouterr().out
    data = bytearray(out.read_bytes())
    data[-40] ^= 1
    out.write_bytes(data)
    assert commands.main(["verify", str(out)]) == 1
    assert "NOT VALID: changed since it was signed" in capsys.readouterr().out


def test_short_options_take_every_character(recipe):
    texts = {"--without": "caption == '🦌\x7f\\\\'", "--image": "🦌 é.png", "--mix": "🦌=2", "--mask": "a\nb\t"}
    options = [part for pair in texts.items() for part in pair]
    config = load_recipe(recipe, sample.overrides(sample.parse_arguments([str(recipe), *options])))[SampleConfig]
    assert (config.without, config.images) == (texts["--without"], (texts["--image"],))
    assert (config.mix, config.mask) == ({"🦌": 2.0}, texts["--mask"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mix", "green"], "wanted pairs such as neon=2"),
        (["--prompt", "a", "--image", "nowhere.png"], "'nowhere.png' cannot be read"),
        (["--again", "nowhere.png"], "wanted a PNG of a sample"),
        (["--prompt", "a", "--mode", "unconditional"], "neighbors"),
        (["--prompt", "a", "--without", "width >"], "condition 'width >': invalid syntax"),
        (["--prompt", "a", "--strength", "0.4"], "strength have no effect without a picture"),
        (["--prompt", "a", "--ray-tasks", "2"], "--ray-tasks draws the whole stage"),
        (["--again", "a.png", "--ray-tasks", "2"], "--ray-tasks draws the whole stage"),
        (["--again", "a.png", "--top-m", "0.5", "--seed", "1"], "leave out --top-m, --seed"),
        (["--ray-tasks", "-1"], "wanted 0 or more, got -1"),
    ],
)
def test_invalid_options_end_the_command_with_code_2(recipe, options, message, capsys):
    with pytest.raises(SystemExit) as error:
        sample.main([str(recipe), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", "   ", "\t\n", "\u3000", "\u200b\ufeff"])
def test_a_prompt_without_visible_characters_is_refused_before_the_model_is_loaded(
    recipe, tmp_path, prompt, monkeypatch, capsys
):
    monkeypatch.setattr("trainer.sampling.sampler.Sampler.open", None)
    with pytest.raises(SystemExit) as error:
        sample.main([str(recipe), "--prompt", prompt, "--out", str(tmp_path / "stag.png")])
    assert error.value.code == 2
    assert "no visible character" in (message := capsys.readouterr().err) or "nothing to condition on" in message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "device", "no permission", "long name"])
def test_an_output_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    recipe, tmp_path, kind, monkeypatch, capsys
):
    monkeypatch.setattr("trainer.sampling.sampler.Sampler.open", None)
    out = tmp_path / "stag.png"
    if kind == "folder":
        out.mkdir()
    elif kind == "device":
        out.symlink_to("/dev/full")
    elif kind == "no permission":
        out = Path("/proc/self/stag.png")
    else:
        out = tmp_path / ("a" * 300 + ".png")
    with pytest.raises(SystemExit) as error:
        sample.main([str(recipe), "--prompt", "a stag", "--out", str(out)])
    assert error.value.code == 2
    assert out.name in capsys.readouterr().err


@pytest.mark.parametrize("out", ["stag.jpg", "nowhere/stag.png"])
def test_an_output_path_that_cannot_be_written_is_refused_at_once(recipe, tmp_path, out, capsys):
    with pytest.raises(SystemExit) as error:
        sample.main([str(recipe), "--prompt", "a stag", "--out", str(tmp_path / out)])
    assert error.value.code == 2
    assert "a file that ends in .png, in an existing folder" in capsys.readouterr().err
