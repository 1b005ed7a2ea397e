"""The stage evaluate: its requests, its scores, and the stage on a root with a tiny trained model."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.evaluation.stored_classifier import read_classifier
from tests.trainer.tiny_run import PROMPTS, STYLES, pictures_of, write_run
from trainer.evaluation.charts import draw_bars
from trainer.evaluation.classifier import train_classifier
from trainer.evaluation.evaluate import run, style_names
from trainer.evaluation.metrics import fit_manifold, frechet_distance, wilson_interval
from trainer.evaluation.recipe import ClassifierConfig, EvaluateConfig
from trainer.evaluation.scores import Reference, SampleFeatures, evaluation
from trainer.evaluation.styles import MODES, draw_prompts, make_style_groups, style_words
from trainer.sampling.picture import read_recipe
from trainer.sampling.recipe import SamplingConfig
from trainer.sampling.sampler import Sampler, TrainedModel

STAGE = "runs/tiny/evaluate"
NAMES = tuple(sorted(STYLES))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Root, TrainedModel]:
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
    classifier = ClassifierConfig(hidden=32, epochs=40)
    quick = {"steps": 2, "guidance": 2.0, "k": 4, "batch_size": 3, "workers": 2, "threads": 1, "device": "cpu"}
    defaults = {"prompts_file": prompts_file, "samples_per_style": 4, "classifier": classifier}
    return EvaluateConfig(**(defaults | quick | settings))


# requests


def test_all_modes_share_the_prompts_and_seeds_of_a_style_and_styles_do_not():
    groups = make_style_groups(SamplingConfig(), 5, NAMES, PROMPTS)
    assert [group.name for group in groups] == [f"{mode}/{style}" for mode in MODES for style in NAMES]
    drawn = {
        group.name: [(p, request.seed) for p, request in zip(group.prompts, group.requests, strict=True)]
        for group in groups
    }
    for style in NAMES:
        assert all(drawn[f"{mode}/{style}"] == drawn[f"retrieval/{style}"] for mode in MODES)
    seeds = [seed for style in NAMES for _, seed in drawn[f"retrieval/{style}"]]
    assert len(set(seeds)) == 15


def test_modes_differ_only_in_how_the_style_is_requested():
    groups = {group.name: group for group in make_style_groups(SamplingConfig(), 1, NAMES, ["a circle"])}
    requests = {
        mode: (request.prompt, request.mode, request.database)
        for mode in MODES
        for request in groups[f"{mode}/deep_red"].requests
    }
    assert requests == {
        "retrieval": ("a circle", "text_and_neighbors", "deep_red"),
        "suffix": ("a circle in the style of deep red", "text", ""),
        "suffix_retrieval": ("a circle in the style of deep red", "text_and_neighbors", "index"),
        "no_neighbors": ("a circle", "text", ""),
    }
    assert groups["suffix/deep_red"].prompts == ("a circle",)


def test_every_prompt_is_used_before_one_repeats_and_the_seed_decides_the_order():
    drawn = [prompt for prompt, _ in draw_prompts(PROMPTS, 7, "green", seed=1)]
    assert all(drawn.count(prompt) in (2, 3) for prompt in PROMPTS)
    assert sorted(drawn[:3]) == sorted(PROMPTS)
    assert draw_prompts(PROMPTS, 7, "green", seed=1) != draw_prompts(PROMPTS, 7, "green", seed=2)


def test_the_name_of_a_style_is_written_in_words():
    assert style_words("stained_glass") == "stained glass"
    assert style_words("ukiyo-e") == "ukiyo e"


# scores


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clusters(label: int, count: int, seed: int) -> np.ndarray:
    centers = np.random.default_rng(7).standard_normal((3, 16))
    return unit(centers[label] + 0.2 * np.random.default_rng([seed, label]).standard_normal((count, 16)))


@pytest.fixture(scope="module")
def figures():
    features = np.concatenate([clusters(label, 60, seed=0) for label in range(3)])
    labels = np.repeat(np.arange(3), 60)
    classifier = train_classifier(features, labels, NAMES, ClassifierConfig(hidden=32, epochs=20), seed=0)
    texts = unit(np.random.default_rng(3).standard_normal((6, 16)))
    samples = {}
    for label, style in enumerate(NAMES):
        right, wrong = clusters(label, 6, seed=1), clusters((label + 1) % 3, 6, seed=2)
        samples["retrieval", style] = SampleFeatures(right, texts)
        samples["suffix", style] = SampleFeatures(np.concatenate([right[:3], wrong[:3]]), texts)
        samples["suffix_retrieval", style] = SampleFeatures(np.concatenate([right[:4], wrong[:2]]), texts)
        # Without neighbors every sample looks like the first style.
        samples["no_neighbors", style] = SampleFeatures(clusters(0, 6, seed=3), texts)
    return (
        samples,
        features,
        evaluation(classifier, samples, Reference(features, fit_manifold(features, 3), 3), seed=0),
    )


def test_accuracies_are_the_shares_of_correct_samples(figures):
    _, _, result = figures
    assert result["style_accuracy_retrieval"] == 1.0
    assert result["style_accuracy_suffix"] == 0.5
    assert result["style_accuracy_suffix_retrieval"] == pytest.approx(2 / 3)
    assert result["style_accuracy_no_neighbors"] == pytest.approx(1 / 3)
    assert (result["num_styles"], result["chance"]) == (3, pytest.approx(1 / 3))
    assert result["style_classifier_accuracy"] >= 0.95


def test_improvements_and_intervals_follow_from_the_accuracies(figures):
    _, _, result = figures
    assert result["relative_improvement"] == pytest.approx(1.0)
    low, high = result["relative_improvement_interval"]
    assert 0.2 < low < 1.0 < high
    row = result["styles"][1]["modes"]["suffix"]
    assert (row["right"], row["samples"]) == (3, 6)
    assert row["accuracy_interval"] == wilson_interval(3, 6)
    assert result["modes"]["suffix"]["accuracy_interval"] == wilson_interval(9, 18)


def test_a_style_without_success_of_the_baseline_has_no_relative_improvement(figures):
    samples, features, _ = figures
    missed = dict(samples)
    missed["suffix", NAMES[0]] = SampleFeatures(clusters(1, 6, seed=4), samples["suffix", NAMES[0]].texts)
    labels = np.repeat(np.arange(3), 60)
    classifier = train_classifier(features, labels, NAMES, ClassifierConfig(hidden=32, epochs=20), seed=0)
    result = evaluation(classifier, missed, Reference(features, fit_manifold(features, 3), 3), seed=0)
    assert result["styles"][0]["relative_improvement"] is None
    assert result["styles"][1]["relative_improvement"] == pytest.approx(1.0)


def test_logits_and_distances_are_better_for_samples_like_the_databases(figures):
    samples, features, result = figures
    modes = result["modes"]
    assert modes["retrieval"]["logit"] > modes["suffix"]["logit"] > modes["no_neighbors"]["logit"]
    assert modes["retrieval"]["frechet_distance"] < modes["no_neighbors"]["frechet_distance"]
    assert modes["retrieval"]["recall"] > modes["no_neighbors"]["recall"]
    pooled = np.concatenate([samples["suffix", style].pictures for style in NAMES])
    assert modes["suffix"]["frechet_distance"] == pytest.approx(frechet_distance(pooled, features))


def test_the_clip_score_pairs_each_picture_with_its_prompt(figures):
    samples, _, result = figures
    features = samples["retrieval", NAMES[2]]
    expected = np.mean([picture @ text for picture, text in zip(features.pictures, features.texts, strict=True)])
    assert result["styles"][2]["modes"]["retrieval"]["clip_score"] == pytest.approx(expected, abs=1e-6)


def test_the_bar_chart_is_wider_for_more_styles(figures, tmp_path):
    import io

    result = figures[2]
    wide = dict(result, styles=result["styles"] * 4)
    sizes = [Image.open(io.BytesIO(draw_bars(values))).size for values in (result, wide)]
    assert sizes[0][0] < sizes[1][0]


# the stage


def test_every_mode_and_style_has_its_samples_and_their_features(evaluated):
    root, manifest, result = evaluated
    assert [shard.shard for shard in manifest.shards] == [
        *[f"{mode}/{style}" for mode in MODES for style in NAMES],
        "report",
    ]
    assert all(shard.rows == 4 for shard in manifest.shards[:-1])
    for name in ("evaluation.json", "bars.png", "classifier.safetensors", "retrieval.png", "no_neighbors.png"):
        assert f"{STAGE}/{name}" in manifest.checksums()
    for number, (prompt, seed) in enumerate(draw_prompts(PROMPTS, 4, "deep_red", seed=0)):
        with root.open(f"{STAGE}/samples/suffix/deep_red/{number:04d}.png") as file:
            recipe = read_recipe(file.read())
        assert (recipe["prompt"], recipe["seed"]) == (f"{prompt} in the style of deep red", seed)
    assert [row["style"] for row in result["styles"]] == list(NAMES)
    assert result["num_styles"] == 3
    # Without neighbors the untrained model draws the same style for all.
    assert result["style_accuracy_no_neighbors"] == pytest.approx(1 / 3, abs=0.34)


def test_the_classifier_learned_the_pictures_of_the_databases(evaluated, tiny):
    root, _, result = evaluated
    assert result["style_classifier_accuracy"] == 1.0
    network, _ = read_classifier(root, STAGE)
    encoder = Sampler.open(root, tiny[1]).encoder
    for label, style in enumerate(network.styles):
        assert np.all(network.logits(encoder.encode_images(pictures_of(style))).argmax(1) == label)


def test_stored_features_belong_to_the_stored_pictures(evaluated, tiny):
    root = evaluated[0]
    encoder = Sampler.open(root, tiny[1]).encoder
    with root.open(f"{STAGE}/samples/retrieval/green/features.npy") as file:
        features = np.load(file)
    pictures = [Image.open(root.local_path(f"{STAGE}/samples/retrieval/green/{n:04d}.png")) for n in range(4)]
    np.testing.assert_allclose(features, encoder.encode_images(pictures), atol=1e-5)


def test_a_finished_run_is_not_repeated_and_a_killed_run_ends_with_the_same_checksums(evaluated, tiny, prompts_file):
    root, manifest, _ = evaluated
    path = root.local_path(f"{STAGE}/evaluation.json")
    before = path.stat().st_mtime_ns
    run(config(prompts_file), tiny[1], root)
    assert path.stat().st_mtime_ns == before
    root.delete(f"{STAGE}/manifest.json")
    root.delete(f"{STAGE}/records/suffix/green.json")
    root.delete(f"{STAGE}/samples/retrieval/sky_blue/features.npy")
    picture = root.local_path(f"{STAGE}/samples/retrieval/green/0000.png")
    written = picture.stat().st_mtime_ns
    resumed = run(config(prompts_file), tiny[1], root)
    assert resumed.checksums() == manifest.checksums()
    assert picture.stat().st_mtime_ns == written


def test_fewer_than_two_styles_are_refused(tmp_path, prompts_file):
    with pytest.raises(UserError, match="at least 2"):
        style_names(config(prompts_file), Root(tmp_path))


def test_a_missing_prompts_file_is_refused(tiny):
    with pytest.raises(UserError, match="prompts_file is not set"):
        run(EvaluateConfig(), tiny[1], tiny[0])


def test_more_manifold_neighbors_than_pictures_are_refused(tiny, prompts_file):
    wide = config(prompts_file, samples_per_style=100, precision_recall_neighbors=99)
    with pytest.raises(UserError, match="72 pictures in all"):
        run(wide, tiny[1], tiny[0])


def test_more_manifold_neighbors_than_samples_per_style_are_refused():
    with pytest.raises(ValidationError, match="less than samples_per_style 3"):
        EvaluateConfig(samples_per_style=3, precision_recall_neighbors=3)
