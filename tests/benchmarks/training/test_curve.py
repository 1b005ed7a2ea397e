"""The curve of the contents of samples over training, on the tiny demo."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.training import curve
from benchmarks.training.conditionings import CONDITIONINGS, NUM_PICTURES, other_conditionings
from benchmarks.training.curve import (
    CurveRequests,
    measure,
    measure_conditionings,
    sample_checkpoints,
    stored_weights,
    trend,
    write_pictures,
)
from benchmarks.training.curve_page import page, trend_text
from jobs.cli.recipe import Recipe, load_recipe
from jobs.demo.judge.labels import CLASSES
from jobs.sample import trained_model
from jobs.train import training_recipe
from retrieval import UserError
from retrieval.clip.encoder import Encoder
from retrieval.recipe import ClipConfig
from tests.jobs.demo.tiny_demo import DEMO, TinyDemo, overrides
from trainer.checkpoint.checkpoint import INDEX
from trainer.data.plan import TrainingPlan, make_plan
from trainer.evaluation.pixel_judge import thumbnails
from trainer.evaluation.recipe import EvaluateConfig
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig
from trainer.sampling.sampler import Sampler

STYLES = 'evaluate.styles=["chalk", "mosaic", "neon", "woodcut"]'


def plan_of(recipe: Recipe) -> TrainingPlan:
    return make_plan(training_recipe(recipe), recipe.root, Autoencoder.load(recipe[AutoencoderConfig], "cpu"))


@pytest.fixture
def longer(tiny_demo: TinyDemo, tmp_path: Path) -> Recipe:
    """A run `long` that started from the tiny demo's: its checkpoints are those of the demo under another name."""
    root = tmp_path / "run"
    (root / "runs").mkdir(parents=True)
    for path in tiny_demo.root.iterdir():
        if path.name != "runs":
            (root / path.name).symlink_to(path)
    (root / "runs/demo").symlink_to(tiny_demo.root / "runs/demo")
    train = root / "runs/long/train"
    shutil.copytree(tiny_demo.root / "runs/demo/train", train)
    (train / "manifest.json").unlink()
    settings = [*overrides(root, tiny_demo.port), "train.name=long", "train.start_from=demo", "train.steps=100", STYLES]
    recipe = load_recipe(DEMO, settings)
    index = train / "checkpoints" / INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | {"identity": plan_of(recipe).checkpoint_identity}))
    return recipe


def test_an_unfinished_run_has_a_point_for_each_checkpoint_after_that_of_its_start(
    longer: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = CurveRequests.of(longer, each=1, steps=2)
    result, pictures = measure(longer, wanted, tmp_path / "kept")
    points = result["points"]
    assert [(point["step"], point["images"]) for point in points] == [(0, 32), (2, 48), (4, 64)]
    assert 0 < points[0]["hours"] < points[1]["hours"] < points[2]["hours"] == pytest.approx(2 * points[0]["hours"])
    assert points[1]["learning_rate"] > points[2]["learning_rate"]
    for point in points:
        assert {*point["shares"]} == {*CLASSES}
        assert all(low <= value <= high for value, low, high in point["shares"].values())
    assert np.array_equal(pictures[0], pictures[4])  # the start is the demo's last step
    assert not np.array_equal(pictures[2], pictures[4])
    assert {*result["conditionings"]} == {*CONDITIONINGS}
    assert {*CLASSES} - {*result["conditionings"]["text"]} == {"style"}
    text = page(json.loads(json.dumps(result)))
    assert "| the prompt and its neighbors, guidance 4 |" in text
    assert "| 48 | 2 | 0.0 |" in text
    assert "It started from the finished run `demo`." in text
    write_pictures(result, pictures, wanted, tmp_path / "docs")
    with (
        Image.open(tmp_path / "docs/images/curve-samples.jpg") as sheet,
        Image.open(tmp_path / "docs/images/curve.png"),
    ):
        assert sheet.height > 3 * 128

    # training goes on and deletes a checkpoint; no other is sampled again
    checkpoints = longer.root.child("runs/long/train/checkpoints")
    index = checkpoints.read_json(INDEX)
    checkpoints.write_json(INDEX, index | {"checkpoints": index["checkpoints"][1:]})
    monkeypatch.setattr(curve, "sample_weights", pytest.fail)
    again, _ = measure(longer, wanted, tmp_path / "kept")
    assert again["points"] == points


def test_a_checkpoint_gives_the_pictures_of_the_model_exported_from_it(tiny_demo: TinyDemo, tmp_path: Path) -> None:
    recipe = load_recipe(DEMO, [*overrides(tiny_demo.root, tiny_demo.port), STYLES])
    wanted = CurveRequests.of(recipe, each=1, steps=2)
    pictures = sample_checkpoints(recipe, wanted, tmp_path)
    sampler = Sampler.open(recipe.root, trained_model(recipe), recipe[EvaluateConfig])
    assert np.array_equal(pictures[4], thumbnails(sample.picture for sample in sampler.sample(wanted.requests)))


def test_other_conditionings_keep_seeds_and_replace_text_and_neighbors_by_pictures(tiny_demo: TinyDemo) -> None:
    recipe = load_recipe(DEMO, [*overrides(tiny_demo.root, tiny_demo.port), STYLES])
    wanted = CurveRequests.of(recipe, each=1, steps=2)
    conditioned = other_conditionings(wanted.scenes, wanted.requests, Encoder(recipe[ClipConfig]))
    sampler = Sampler.open(recipe.root, trained_model(recipe), recipe[EvaluateConfig])
    tokens = {}
    for name, requests in conditioned.items():
        assert [request.seed for request in requests] == [request.seed for request in wanted.requests]
        items = [item for batch in sampler.plan(requests) for item in batch.items]
        tokens[name] = {(len(item.context), len(item.neighbors)) for item in items}
        assert {item.request.guidance for item in items} == {{"guidance_1": 1.0, "guidance_4": 4.0}.get(name, 3.0)}
    assert tokens["text"] == tokens["picture"] == {(1, 0)}
    assert tokens["pictures"] == {(NUM_PICTURES, 0)}
    ((count, neighbors),) = tokens["guidance_1"]
    assert count == neighbors + 1 > 1
    for request in conditioned["pictures"]:
        assert len({image.vector for image in request.images}) == NUM_PICTURES


def test_a_checkpoint_that_training_deleted_meanwhile_is_an_error(longer: Recipe, tmp_path: Path) -> None:
    wanted = CurveRequests.of(longer, each=1, steps=1)
    with pytest.raises(UserError, match="deleted its checkpoint of step 6 meanwhile"):
        measure_conditionings(longer, wanted, tmp_path, steps=(0, 2, 6))


def test_a_run_without_checkpoints_and_checkpoints_of_other_settings_are_refused(longer: Recipe) -> None:
    checkpoints = longer.root.child("runs/long/train/checkpoints")
    checkpoints.write_json(INDEX, checkpoints.read_json(INDEX) | {"identity": "other"})
    with pytest.raises(UserError, match="has checkpoints of another run"):
        stored_weights(plan_of(longer), longer.root, known=())
    scratch = load_recipe(longer.path, [*longer.overrides, "train.name=new", "train.start_from="])
    with pytest.raises(UserError, match="runs/new/train/checkpoints has no checkpoint yet"):
        stored_weights(plan_of(scratch), scratch.root, known=())


def test_a_trend_reaches_the_goal_where_the_line_through_the_log_odds_does() -> None:
    # log-odds of -2, -1 and 0 at 1000, 2000 and 4000 images
    correct = np.stack([np.arange(1000) * (1 + np.exp(-odds)) < 1000 for odds in (-2, -1, 0)])
    values = trend([1000, 2000, 4000], correct, range(1000))
    assert values is not None
    slope, low, high = values["slope"]
    assert low < 1 < high
    assert slope == pytest.approx(1, abs=0.01)
    images, first, last = values["images"]
    assert first < images < last
    assert images == pytest.approx(4000 * 2 ** np.log(0.85 / 0.15), rel=0.02)
    assert "times the images of the first row" in trend_text(values, 1000)


def test_points_without_a_rise_or_too_few_give_no_forecast() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random((3, 50)) < 0.3
    assert "not distinguishable from 0" in trend_text(trend([1, 2, 4], correct, range(50)), 1)
    assert trend([1, 2], correct[:2], range(50)) is None
    assert "Too few points" in trend_text(None, 1)
