"""The demo's trained models: written from a finished demo, and used by another one in the place of training."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.cli.recipe import Recipe, load_recipe
from jobs.demo import trained
from jobs.demo.run import main
from retrieval.errors import UserError
from retrieval.storage.root import file_sha256
from tests.jobs.demo.tiny_demo import DEMO, TinyDemo, overrides
from trainer.checkpoint.export import WEIGHTS


@pytest.fixture(scope="module")
def published(tiny_demo: TinyDemo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the tiny demo, as a folder of trained models."""
    folder = tmp_path_factory.mktemp("published") / "trained_models"
    trained.publish(load_recipe(DEMO, overrides(tiny_demo.root, tiny_demo.port)), folder)
    return folder


def recipe_that_starts(root: Path, port: int) -> Recipe:
    return load_recipe(DEMO, [*overrides(root, port), f"train.start_from={trained.RUN}"])


def use(recipe: Recipe) -> None:
    trained.copy_model("clip", recipe.root)
    trained.copy_model("autoencoder", recipe.root)
    trained.import_network(recipe)


def test_a_demo_starts_with_the_published_models_in_half_precision(
    tiny_demo: TinyDemo, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "FOLDER", published)
    recipe = recipe_that_starts(tmp_path, tiny_demo.port)
    assert trained.is_start(recipe)
    use(recipe)
    for name, (weights, _) in trained.FILES.items():
        assert file_sha256(tmp_path / name / weights) == file_sha256(tiny_demo.root / name / weights)
    theirs = load_file(tiny_demo.root / "runs/demo/train/model" / WEIGHTS)
    ours = load_file(tmp_path / f"runs/{trained.RUN}/train/model" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].half().float()) for name in ours)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    use(recipe)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_network_that_started_with_the_published_one_keeps_the_record_of_its_trainings(
    tiny_demo: TinyDemo, published: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(published, tmp_path / "trained_models")
    before = json.loads((folder / trained.TRAININGS).read_text())
    [first] = before["network"]
    start = [*overrides(tiny_demo.root, tiny_demo.port), f"train.start_from={trained.RUN}"]
    trained.publish(load_recipe(DEMO, start), folder)
    second = first | {"recipe": f"{first['recipe']} --set train.start_from={trained.RUN}"}
    assert json.loads((folder / trained.TRAININGS).read_text()) == before | {"network": [first, second]}
    assert (folder / "README.md").read_text().count(f"  - {first['steps']:,} steps in") == 2


def test_a_network_is_not_used_with_another_autoencoder(
    tiny_demo: TinyDemo, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(published, tmp_path / "trained_models")
    config = folder / "network/recipe.json"
    config.write_text(re.sub(r'("autoencoder_identity": ")..', r"\g<1>00", config.read_text()))
    monkeypatch.setattr(trained, "FOLDER", folder)
    with pytest.raises(UserError, match="was trained on latents of autoencoder 00"):
        use(recipe_that_starts(tmp_path / "root", tiny_demo.port))


@pytest.mark.parametrize("folder", ["published", "repository"])
def test_the_page_of_the_models_states_the_checksum_of_every_file(folder: str, published: Path) -> None:
    models = published if folder == "published" else trained.FOLDER
    stated = dict(re.findall(r"^\| `(.+)` \| .* \| `(\w{64})` \|$", (models / "README.md").read_text(), re.MULTILINE))
    files = [path for path in models.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) == 9
    assert {str(path.relative_to(models)): file_sha256(path) for path in files} == stated


def test_the_demo_of_the_repository_starts_with_its_trained_models(tmp_path: Path) -> None:
    recipe = load_recipe(
        DEMO.with_name("demo.toml"),
        [f"root={tmp_path}", f"clip.model=local-dir:{tmp_path}/clip", f"autoencoder.path={tmp_path}/autoencoder"],
    )
    assert trained.is_start(recipe)
    use(recipe)


def test_the_option_train_reads_the_recipe_that_trains_all_models(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(DEMO.with_name("demo.toml")), "--train", "--dry-run"])
    assert '"root": "runs/demo_train"' in capsys.readouterr().out
    assert not trained.is_start(load_recipe(DEMO))
