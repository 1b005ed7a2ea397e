"""The benchmark of attribution on the tiny demo: the rows of a style leave the tables, and three models draw."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.training.attribution import (
    KINDS,
    SOURCE_FILE,
    check_options,
    copy_folder,
    copy_tables,
    correlation,
    measure,
    page,
    style_ids,
)
from jobs.cli.recipe import Recipe, load_recipe
from retrieval import Database, Root, UserError
from retrieval.storage.manifest import read_manifest
from tests.jobs.demo.tiny_demo import TinyDemo, tiny_recipe
from tests.jobs.finetune.test_finetune import in_process


def linked_run(tiny_demo: TinyDemo, tmp_path: Path) -> Recipe:
    """The recipe of a run in which the benchmark may add a training run; all else are links."""
    root = tmp_path / "run"
    root.mkdir()
    for path in tiny_demo.root.iterdir():
        if path.name != "runs":
            (root / path.name).symlink_to(path)
    (root / "runs").mkdir()
    (root / "runs/demo").symlink_to(tiny_demo.root / "runs/demo")
    path = tmp_path / "recipe.toml"
    path.write_text(tiny_recipe().replace("runs/demo", str(root)))
    return load_recipe(path, ["evaluate.k=4", "evaluate.guidance=1.0"])


@pytest.mark.usefixtures("ray_cluster")
def test_a_style_leaves_the_tables_of_the_model_trained_without_it(
    tiny_demo: TinyDemo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = linked_run(tiny_demo, tmp_path)
    root = tmp_path / "run"
    with in_process(monkeypatch):
        result = measure(recipe, "pointillism", 2)
    ids, others = set(style_ids(Root(root / "world"), "pointillism")), Root(f"{root}-without-pointillism")
    index = Database.open(others.child("index"))
    left = set(index.metadata()["image_id"].to_pylist()) - set(index.hidden.tolist())
    assert ids & set(Database.open(str(root / "index")).metadata()["image_id"].to_pylist())
    assert left
    assert not left & ids
    assert read_manifest(others, "neighbors").rows < read_manifest(Root(root), "neighbors").rows
    trained = [
        read_manifest(each, f"runs/{name}/train").fingerprint
        for each, name in ((Root(root), "demo"), (Root(root), "demo-other-seed"), (others, "demo"))
    ]
    assert len(set(trained)) == 3
    assert [row["kind"] for row in result["kinds"]] == [*KINDS]
    unchanged = [row for row in result["kinds"] if row["removed"] == 0]
    assert "other" in [row["kind"] for row in unchanged]
    for row in unchanged:
        assert row["sampled_without"]["similarity"][0] == pytest.approx(1)
        assert row["correlation"] is None
    assert "trained and sampled without the group" in page(json.loads(json.dumps(result)))


def test_a_copy_of_other_tables_is_refused(tiny_demo: TinyDemo, tmp_path: Path) -> None:
    recipe = linked_run(tiny_demo, tmp_path)
    folder = copy_folder(recipe, "pointillism")
    copy_tables(recipe, folder)
    copy_tables(recipe, folder)
    copy = Root(folder)
    source = copy.read_json(SOURCE_FILE)
    copy.write_json(SOURCE_FILE, source | {"neighbors": "those of an earlier run"})
    with pytest.raises(UserError, match="was copied from other tables"):
        copy_tables(recipe, folder)


def test_a_wrong_style_and_too_many_requests_are_refused_before_any_work(tiny_demo: TinyDemo, tmp_path: Path) -> None:
    recipe = linked_run(tiny_demo, tmp_path)
    with pytest.raises(UserError, match=r"--style must be one of .*pointillism.*, got 'neom'"):
        measure(recipe, "neom", 2)
    for each in (1, 10_000):
        with pytest.raises(UserError, match=rf"--each must be from 2 to \d+, the prompts of .*; got {each}"):
            measure(recipe, "pointillism", each)
    started = load_recipe(recipe.path, [*recipe.overrides, "train.start_from=other"])
    with pytest.raises(UserError, match="starts the training from 'other', which knows the style"):
        check_options(started, "pointillism", 2)
    check_options(recipe, "pointillism", 2)
    assert not copy_folder(recipe, "pointillism").exists()


def test_a_correlation_with_equal_distances_is_not_defined() -> None:
    rising, equal = np.array([0.1, 0.2, 0.4]), np.array([0.0, 1e-7, 0.0])
    assert correlation(rising, 2 * rising) == pytest.approx(1)
    assert correlation(rising, -rising) == pytest.approx(-1)
    assert correlation(rising, equal) is None
