"""The benchmark of attribution on the tiny demo: the rows of a style leave the tables, and three models draw."""

import json
from pathlib import Path

import pytest

from benchmarks.training.attribution import KINDS, measure, page, style_ids
from jobs.cli.recipe import load_recipe
from retrieval import Database, Root
from retrieval.storage.manifest import read_manifest
from tests.jobs.demo.tiny_demo import TinyDemo, tiny_recipe
from tests.jobs.finetune.test_finetune import in_process


@pytest.mark.usefixtures("ray_cluster")
def test_a_style_leaves_the_tables_of_the_model_trained_without_it(
    tiny_demo: TinyDemo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    root.mkdir()
    for path in tiny_demo.root.iterdir():
        if path.name != "runs":
            (root / path.name).symlink_to(path)
    (root / "runs").mkdir()  # the benchmark adds a run
    (root / "runs/demo").symlink_to(tiny_demo.root / "runs/demo")
    path = tmp_path / "recipe.toml"
    path.write_text(tiny_recipe().replace("runs/demo", str(root)))
    recipe = load_recipe(path, ["evaluate.k=4", "evaluate.guidance=1.0"])
    with in_process(monkeypatch):
        result = measure(recipe, "mosaic", 2)
    ids, others = set(style_ids(Root(root / "world"), "mosaic")), Root(f"{root}-without-mosaic")
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
    assert all(row["all"]["similarity"][0] == pytest.approx(1) for row in result["kinds"])
    assert "trained and sampled without the group" in page(json.loads(json.dumps(result)))
