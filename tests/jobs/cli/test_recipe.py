"""A recipe with a mistake is refused before any work, and the error names the wrong key."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.command import stage_command
from jobs.cli.recipe import load_recipe
from jobs.demo.recipe import WorldConfig
from pipeline.recipe import EmbedConfig, NeighborsConfig
from retrieval import UserError
from retrieval.file_cache import FileCache
from retrieval.recipe import ClipConfig
from trainer.sampling.recipe import SampleConfig

CONFIGS = Path(__file__).resolve().parents[3] / "jobs" / "configs"
SMALL = 'root = "runs/x"\n[clip]\nmodel = "local-dir:clip"\n[neighbors]\nk = 4\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A small valid recipe."""
    path = tmp_path / "recipe.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_recipe_of_the_project_is_valid(path: Path) -> None:
    assert load_recipe(path).resolved()["root"]
    assert path.read_text().startswith("#"), "a recipe starts with its command, hardware and expected result"


def test_values_come_from_the_file_then_from_overrides_then_from_defaults(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["neighbors.k=6", "clip.model=local-dir:other", "embed.batch_size=9"])
    assert loaded[NeighborsConfig].k == 6
    assert loaded[NeighborsConfig].near_copy_similarity == 0.96
    assert loaded[ClipConfig].model == "local-dir:other"
    assert loaded[EmbedConfig].batch_size == 9
    assert load_recipe(recipe, ["root=elsewhere"]).root.url == "elsewhere"
    again = load_recipe(Path(loaded.arguments()[0]), loaded.arguments()[2::2])
    assert again.resolved() == loaded.resolved()


def test_the_section_storage_sets_the_cache_of_every_database_below_the_root(recipe: Path, tmp_path: Path) -> None:
    assert load_recipe(recipe).root.cache == ("", 0.0)
    loaded = load_recipe(recipe, ["root=memory://recipe", f"storage.cache_folder={tmp_path}", "storage.cache_gb=2.5"])
    assert loaded.root.cache == (str(tmp_path), 2.5)
    sent = pickle.loads(pickle.dumps(loaded.root)).child("index")
    files = FileCache(sent)
    assert (files.folder, files.max_bytes) == (tmp_path, 2.5e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SMALL.replace("k = 4", "kk = 4"),
            r"section \[neighbors\]\n  kk: Extra inputs.*\nKnown keys: .*\bk, near_copy",
        ),
        (SMALL.replace("k = 4", "k = 0"), r"k: Input should be greater than or equal to 1, got 0"),
        (
            SMALL.replace("k = 4", "seed = -1"),
            r"\[neighbors\]\n  seed: Input should be greater than or equal to 0, got -1",
        ),
        (SMALL + "[index]\nseed = -1", r"\[index\]\n  seed: Input should be greater than or equal to 0, got -1"),
        (SMALL.replace("k = 4", 'k = "4"'), r"k: Input should be a valid integer, got '4'"),
        (SMALL.replace("[neighbors]", "[neighbours]"), r"unknown section \[neighbours\]"),
        (SMALL.replace('root = "runs/x"', ""), "root must be a folder"),
        (SMALL + "[", "is not TOML"),
    ],
)
def test_a_mistake_names_the_section_the_key_and_what_was_found(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(recipe)


def test_an_override_may_set_a_key_of_a_nested_section(recipe: Path) -> None:
    assert load_recipe(recipe, ["embed.patches.max_patches=10"])[EmbedConfig].patches.max_patches == 10
    mix = load_recipe(recipe, ["sample.mix={neon = 1.0}", 'sample.mix."ukiyo-e"=2.0'])[SampleConfig].mix
    assert dict(mix) == {"neon": 1.0, "ukiyo-e": 2.0}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("root.x=1", r"--set root.x=1: root is 'runs/x', not a section"),
        ("neighbors.k.x=1", r"--set neighbors.k.x=1: neighbors.k is 4, not a section"),
        ("neighbors.k=2024-01-01", r"k: Input should be a valid integer, got '2024-01-01'"),
        ("neighbors.k=12:30:00", r"k: Input should be a valid integer"),
        ("neighbors.near_copy_similarity=inf", r"near_copy_similarity: .*got inf"),
        ("neighbors.near_copy_similarity=nan", r"near_copy_similarity: "),
    ],
)
def test_a_value_of_the_wrong_kind_names_the_key(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, [override])


@pytest.mark.parametrize("override", ["neighbors", "neighbors=3", "=3", "a b.c=1", ".k=1"])
def test_an_override_that_names_no_key_is_refused(recipe: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"wanted section\.key=value"):
        load_recipe(recipe, [override])


def test_a_missing_section_is_named_when_it_is_needed(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"no section \[embed\]"):
        load_recipe(recipe)[EmbedConfig]


def test_a_command_prints_the_resolved_recipe_or_a_clean_error(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = stage_command("neighbors", "", lambda recipe: None)
    main([str(recipe), "--dry-run"])
    assert '"near_copy_similarity": 0.96' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([str(recipe), "--dry-run", "--set", "neighbors.q=1"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message


def test_an_extension_adds_its_sections(recipe: Path) -> None:
    recipe.write_text('extension = "jobs.demo"\n' + SMALL + "[world]\nport = 4000\n")
    assert load_recipe(recipe)[WorldConfig].port == 4000
    recipe.write_text(SMALL + "[world]\nport = 4000\n")
    with pytest.raises(UserError, match=r"unknown section \[world\]"):
        load_recipe(recipe)
    recipe.write_text(SMALL)
    with pytest.raises(UserError, match="no section for WorldConfig"):
        load_recipe(recipe)[WorldConfig]


@pytest.mark.parametrize(
    ("name", "message"),
    [('"os"', "a package below jobs"), ("3", "a package below jobs"), ('"jobs.nothing"', "cannot be imported")],
)
def test_only_packages_of_the_project_are_extensions(recipe: Path, name: str, message: str) -> None:
    recipe.write_text(f"extension = {name}\n{SMALL}")
    with pytest.raises(UserError, match=message):
        load_recipe(recipe)


def test_reading_a_recipe_with_an_extension_imports_no_heavy_library() -> None:
    program = (
        "import sys; from pathlib import Path; from jobs.cli.recipe import load_recipe;"
        "load_recipe(Path(sys.argv[1]));"
        "print([name for name in ('torch', 'ray', 'faiss') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", program, str(CONFIGS / "demo.toml")]
    done = subprocess.run(arguments, cwd=CONFIGS.parents[1], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
