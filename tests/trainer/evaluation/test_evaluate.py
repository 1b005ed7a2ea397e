"""Stage evaluate: what is asked, how it is judged, and the stage on a root as training leaves it."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.tiny_run import PROMPTS, STYLES, pictures_of, write_run
from trainer.evaluation.charts import draw_bars
from trainer.evaluation.classifier import load_classifier, train_classifier
from trainer.evaluation.evaluate import run, style_names
from trainer.evaluation.judgement import Reference, Shown, evaluation
from trainer.evaluation.metrics import balls, frechet_distance, wilson_interval
from trainer.evaluation.styles import MODES, draw_prompts, make_cells, style_words
from trainer.sampling.picture import read_recipe
from trainer.sampling.recipe import ClassifierConfig, EvaluateConfig, SamplingConfig
from trainer.sampling.sampler import Sampler, Trained

STAGE = "runs/tiny/evaluate"
NAMES = tuple(sorted(STYLES))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Root, Trained]:
    return write_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


@pytest.fixture(scope="module")
def evaluated(tiny, prompts_file):
    root, trained = tiny
    manifest = run(config(prompts_file), trained, root)
    return root, manifest, root.read_json(f"{STAGE}/evaluation.json")


def config(prompts_file: str, **settings) -> EvaluateConfig:
    judge = ClassifierConfig(hidden=32, epochs=40)
    quick = {
        "steps": 2,
        "guidance": 2.0,
        "k": 4,
        "batch_size": 3,
        "workers": 2,
        "threads": 1,
        "device": "cpu",
    }
    defaults = {"prompts_file": prompts_file, "samples_per_style": 4, "classifier": judge}
    return EvaluateConfig(**(defaults | quick | settings))


# what is asked


def test_all_modes_share_the_prompts_and_seeds_of_a_style_and_styles_do_not():
    cells = make_cells(SamplingConfig(), 5, NAMES, PROMPTS)
    assert [cell.name for cell in cells] == [f"{mode}/{style}" for mode in MODES for style in NAMES]
    drawn = {
        cell.name: [(p, one.seed) for p, one in zip(cell.prompts, cell.requests, strict=True)]
        for cell in cells
    }
    for style in NAMES:
        assert all(drawn[f"{mode}/{style}"] == drawn[f"retrieval/{style}"] for mode in MODES)
    seeds = [seed for style in NAMES for _, seed in drawn[f"retrieval/{style}"]]
    assert len(set(seeds)) == 15


def test_only_the_way_of_asking_for_the_style_differs_between_modes():
    cells = {cell.name: cell for cell in make_cells(SamplingConfig(), 1, NAMES, ["a circle"])}
    asked = {
        mode: (one.prompt, one.mode, one.database)
        for mode in MODES
        for one in cells[f"{mode}/deep_red"].requests
    }
    assert asked == {
        "retrieval": ("a circle", "text_and_neighbors", "deep_red"),
        "suffix": ("a circle in the style of deep red", "text", ""),
        "suffix_retrieval": ("a circle in the style of deep red", "text_and_neighbors", "index"),
        "no_neighbors": ("a circle", "text", ""),
    }
    assert cells["suffix/deep_red"].prompts == ("a circle",)


def test_a_styles_prompts_do_not_depend_on_the_other_styles_and_none_repeats_early():
    drawn = [prompt for prompt, _ in draw_prompts(PROMPTS, 7, "green", seed=1)]
    assert all(drawn.count(prompt) in (2, 3) for prompt in PROMPTS)
    assert sorted(drawn[:3]) == sorted(PROMPTS)
    assert draw_prompts(PROMPTS, 7, "green", seed=1) != draw_prompts(PROMPTS, 7, "green", seed=2)


def test_words_of_a_style_are_those_of_its_folder():
    assert style_words("stained_glass") == "stained glass"
    assert style_words("ukiyo-e") == "ukiyo e"


# how it is judged


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clusters(label: int, count: int, seed: int) -> np.ndarray:
    centers = np.random.default_rng(7).standard_normal((3, 16))
    return unit(centers[label] + 0.2 * np.random.default_rng([seed, label]).standard_normal((count, 16)))


@pytest.fixture(scope="module")
def figures():
    features = np.concatenate([clusters(label, 60, seed=0) for label in range(3)])
    labels = np.repeat(np.arange(3), 60)
    judge = train_classifier(features, labels, NAMES, ClassifierConfig(hidden=32, epochs=20), seed=0)
    texts = unit(np.random.default_rng(3).standard_normal((6, 16)))
    shown = {}
    for label, style in enumerate(NAMES):
        right, wrong = clusters(label, 6, seed=1), clusters((label + 1) % 3, 6, seed=2)
        shown["retrieval", style] = Shown(right, texts)
        shown["suffix", style] = Shown(np.concatenate([right[:3], wrong[:3]]), texts)
        shown["suffix_retrieval", style] = Shown(np.concatenate([right[:4], wrong[:2]]), texts)
        # every sample looks like the first style, whatever was asked for
        shown["no_neighbors", style] = Shown(clusters(0, 6, seed=3), texts)
    return shown, features, evaluation(judge, shown, Reference(features, balls(features, 3), 3), seed=0)


def test_accuracies_are_the_shares_that_were_put_in(figures):
    _, _, found = figures
    assert found["style_accuracy_retrieval"] == 1.0
    assert found["style_accuracy_suffix"] == 0.5
    assert found["style_accuracy_suffix_retrieval"] == pytest.approx(2 / 3)
    assert found["style_accuracy_no_neighbors"] == pytest.approx(1 / 3)
    assert (found["num_styles"], found["chance"]) == (3, pytest.approx(1 / 3))
    assert found["style_classifier_accuracy"] >= 0.95


def test_improvements_and_intervals_follow_from_the_accuracies(figures):
    _, _, found = figures
    assert found["relative_improvement"] == pytest.approx(1.0)
    low, high = found["relative_improvement_interval"]
    assert 0.2 < low < 1.0 < high
    row = found["styles"][1]["modes"]["suffix"]
    assert (row["right"], row["samples"]) == (3, 6)
    assert row["accuracy_interval"] == wilson_interval(3, 6)
    assert found["modes"]["suffix"]["accuracy_interval"] == wilson_interval(9, 18)


def test_a_style_that_the_baseline_never_reaches_has_no_relative_improvement(figures):
    shown, features, _ = figures
    missed = dict(shown)
    missed["suffix", NAMES[0]] = Shown(clusters(1, 6, seed=4), shown["suffix", NAMES[0]].texts)
    labels = np.repeat(np.arange(3), 60)
    judge = train_classifier(features, labels, NAMES, ClassifierConfig(hidden=32, epochs=20), seed=0)
    found = evaluation(judge, missed, Reference(features, balls(features, 3), 3), seed=0)
    assert found["styles"][0]["relative_improvement"] is None
    assert found["styles"][1]["relative_improvement"] == pytest.approx(1.0)


def test_logits_and_distances_favor_the_samples_that_look_like_the_databases(figures):
    shown, features, found = figures
    modes = found["modes"]
    assert modes["retrieval"]["logit"] > modes["suffix"]["logit"] > modes["no_neighbors"]["logit"]
    assert modes["retrieval"]["frechet_distance"] < modes["no_neighbors"]["frechet_distance"]
    assert modes["retrieval"]["recall"] > modes["no_neighbors"]["recall"]
    pooled = np.concatenate([shown["suffix", style].pictures for style in NAMES])
    assert modes["suffix"]["frechet_distance"] == pytest.approx(frechet_distance(pooled, features))


def test_the_clip_score_pairs_each_picture_with_its_own_prompt(figures):
    shown, _, found = figures
    one = shown["retrieval", NAMES[2]]
    wanted = np.mean([picture @ text for picture, text in zip(one.pictures, one.texts, strict=True)])
    assert found["styles"][2]["modes"]["retrieval"]["clip_score"] == pytest.approx(wanted, abs=1e-6)


def test_bars_are_a_picture_that_grows_with_the_styles(figures, tmp_path):
    import io

    found = figures[2]
    wide = dict(found, styles=found["styles"] * 4)
    sizes = [Image.open(io.BytesIO(draw_bars(one))).size for one in (found, wide)]
    assert sizes[0][0] < sizes[1][0]


# the stage


def test_every_mode_and_style_has_its_samples_and_their_features(evaluated):
    root, manifest, found = evaluated
    assert [shard.shard for shard in manifest.shards] == [
        *[f"{mode}/{style}" for mode in MODES for style in NAMES],
        "report",
    ]
    assert all(shard.rows == 4 for shard in manifest.shards[:-1])
    for name in (
        "evaluation.json",
        "bars.png",
        "classifier.safetensors",
        "retrieval.png",
        "no_neighbors.png",
    ):
        assert f"{STAGE}/{name}" in manifest.checksums()
    for number, (prompt, seed) in enumerate(draw_prompts(PROMPTS, 4, "deep_red", seed=0)):
        with root.open(f"{STAGE}/samples/suffix/deep_red/{number:04d}.png") as file:
            recipe = read_recipe(file.read())
        assert (recipe["prompt"], recipe["seed"]) == (f"{prompt} in the style of deep red", seed)
    assert [row["style"] for row in found["styles"]] == list(NAMES)
    assert found["num_styles"] == 3
    # without their neighbors, samples owe nothing to a style: the untrained model shows one look
    assert found["style_accuracy_no_neighbors"] == pytest.approx(1 / 3, abs=0.34)


def test_the_judge_learned_the_databases_pictures(evaluated, tiny):
    root, _, found = evaluated
    assert found["style_classifier_accuracy"] == 1.0
    judge = load_classifier(root, STAGE).classifier
    encoder = Sampler.open(root, tiny[1]).encoder
    for label, style in enumerate(judge.styles):
        assert np.all(judge.logits(encoder.encode_images(pictures_of(style))).argmax(1) == label)


def test_features_are_those_of_the_stored_pictures(evaluated, tiny):
    root = evaluated[0]
    encoder = Sampler.open(root, tiny[1]).encoder
    with root.open(f"{STAGE}/samples/retrieval/green/features.npy") as file:
        features = np.load(file)
    pictures = [Image.open(root.local_path(f"{STAGE}/samples/retrieval/green/{n:04d}.png")) for n in range(4)]
    np.testing.assert_allclose(features, encoder.encode_images(pictures), atol=1e-5)


def test_running_again_does_nothing_and_a_killed_run_ends_with_the_same_checksums(
    evaluated, tiny, prompts_file
):
    root, manifest, _ = evaluated
    place = root.local_path(f"{STAGE}/evaluation.json")
    before = place.stat().st_mtime_ns
    run(config(prompts_file), tiny[1], root)
    assert place.stat().st_mtime_ns == before
    root.delete(f"{STAGE}/manifest.json")
    root.delete(f"{STAGE}/records/suffix/green.json")
    root.delete(f"{STAGE}/samples/retrieval/sky_blue/features.npy")
    kept = root.local_path(f"{STAGE}/samples/retrieval/green/0000.png").stat().st_mtime_ns
    again = run(config(prompts_file), tiny[1], root)
    assert again.checksums() == manifest.checksums()
    assert root.local_path(f"{STAGE}/samples/retrieval/green/0000.png").stat().st_mtime_ns == kept


def test_fewer_than_two_styles_are_refused(tmp_path, prompts_file):
    with pytest.raises(UserError, match="at least 2"):
        style_names(config(prompts_file), Root(tmp_path))


def test_no_prompts_file_is_refused(tiny):
    with pytest.raises(UserError, match="prompts_file is not set"):
        run(EvaluateConfig(), tiny[1], tiny[0])


def test_balls_wider_than_all_pictures_are_refused(tiny, prompts_file):
    wide = config(prompts_file, samples_per_style=100, precision_recall_neighbors=99)
    with pytest.raises(UserError, match="72 pictures in all"):
        run(wide, tiny[1], tiny[0])


def test_balls_wider_than_a_styles_samples_are_refused():
    with pytest.raises(ValidationError, match="less than samples_per_style 3"):
        EvaluateConfig(samples_per_style=3, precision_recall_neighbors=3)
