"""The stage evaluate: its requests, its scores, and the stage on a root with a tiny trained model."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from jobs.reporting.estimates import estimate_text
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.hidden import HIDDEN_FOLDER, hide
from retrieval.storage.root import Root
from tests.trainer.evaluation.stored_classifier import read_classifier
from tests.trainer.tiny_run import PROMPTS, STYLES, pictures_of, write_run
from trainer.evaluation.charts import draw_bars
from trainer.evaluation.classifier import TrainedClassifier, train_classifier
from trainer.evaluation.evaluate import database_rows, draw_part, run, style_names
from trainer.evaluation.intervals import Bootstrap, share
from trainer.evaluation.metrics import KernelDistance
from trainer.evaluation.paper.charts import improvement_chart
from trainer.evaluation.pixel_judge import EDGE
from trainer.evaluation.recipe import ClassifierConfig, EvaluateConfig, PixelClassifierConfig
from trainer.evaluation.scores import Evaluator, Reference, SampleFeatures, results
from trainer.evaluation.style_descriptor import StyleDescriptor, StyleGallery
from trainer.evaluation.styles import MODES, draw_prompts, make_style_groups, style_words
from trainer.sampling.picture import read_recipe
from trainer.sampling.recipe import SamplingConfig
from trainer.sampling.resumable import Part
from trainer.sampling.sampler import Sampler, TrainedModel

STAGE = "runs/tiny/evaluate"
NAMES = tuple(sorted(STYLES))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Root, TrainedModel]:
    return write_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> str:
    """A prompts file; its folder has pictures for the judge on pixels as well."""
    folder = tmp_path_factory.mktemp("prompts")
    rows = {"path": [], "style": []}
    for style in NAMES:
        for number, picture in enumerate(pictures_of(style, 10)):
            picture.save(folder / f"{style}-{number}.png")
            rows["path"].append(f"{style}-{number}.png")
            rows["style"].append(style_words(style))
    pq.write_table(pa.table(rows), folder / "judge.parquet")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return str(folder / "prompts.txt")


@pytest.fixture(scope="module")
def evaluated(tiny, prompts_file):
    root, trained = tiny
    manifest = run(config(prompts_file), trained, root)
    return root, manifest, root.read_json(f"{STAGE}/evaluation.json")


def config(prompts_file: str, **settings) -> EvaluateConfig:
    classifier = ClassifierConfig(hidden=32, epochs=40)
    quick = {"steps": 2, "guidance": 2.0, "k": 4, "batch_size": 3, "workers": 2, "threads": 1, "device": "cpu"}
    defaults = {"prompts_file": prompts_file, "samples_per_style": 4, "classifier": classifier}
    defaults["judge_pictures"] = str(Path(prompts_file).with_name("judge.parquet"))
    defaults["pixel_classifier"] = PixelClassifierConfig(epochs=5, batch_size=4)
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


def test_styles_have_prompts_of_their_own_where_the_recipe_says_so():
    prompts = [f"prompt {n % 9}" for n in range(12)]  # 9 different ones
    groups = make_style_groups(SamplingConfig(), 3, NAMES, prompts, prompts_per_style=3)
    drawn = {group.style: set(group.prompts) for group in groups if group.mode == "retrieval"}
    assert set().union(*drawn.values()) == set(prompts)
    assert [len(part) for part in drawn.values()] == [3, 3, 3]
    assert all(set(group.prompts) == drawn[group.style] for group in groups)
    with pytest.raises(UserError, match="needs 12 different prompts for 3 styles, prompts_file has 9"):
        make_style_groups(SamplingConfig(), 4, NAMES, prompts, prompts_per_style=4)


def test_the_name_of_a_style_is_written_in_words():
    assert style_words("stained_glass") == "stained glass"
    assert style_words("ukiyo-e") == "ukiyo e"


# scores


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clusters(label: int, count: int, seed: int) -> np.ndarray:
    centers = np.random.default_rng(7).standard_normal((3, 16))
    return unit(centers[label] + 0.2 * np.random.default_rng([seed, label]).standard_normal((count, 16)))


TEXTS = unit(np.random.default_rng(3).standard_normal((6, 16)))
SIX_PROMPTS = tuple(f"prompt {i // 2}" for i in range(6))


class ByGrayLevel:
    """A judge on pixels: black is the first style, 1 the second, 2 the third."""

    styles = NAMES

    def logits(self, rows: np.ndarray) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[rows[:, 0, 0, 0]]

    def state_dict(self) -> dict:
        return {}


class GrayLevels(StyleDescriptor):
    """Describes a picture by its gray level, 0, 1 or 2."""

    def describe(self, pixels: np.ndarray) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[pixels[:, 0, 0, 0]]


def samples_of(pictures: np.ndarray, gray: int = 0) -> SampleFeatures:
    return SampleFeatures(pictures, TEXTS, SIX_PROMPTS, np.full((6, EDGE, EDGE, 3), gray, np.uint8))


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    rows = {style: clusters(label, 60, seed=0) for label, style in enumerate(NAMES)}
    features, labels = np.concatenate([*rows.values()]), np.repeat(np.arange(3), 60)
    classifier = train_classifier(features, labels, NAMES, ClassifierConfig(hidden=32, epochs=20), seed=0)
    pixels = TrainedClassifier(ByGrayLevel(), 1.0, dict.fromkeys(NAMES, 1.0), 30)
    vectors = np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2, 2]]
    gallery = StyleGallery(GrayLevels(0.0), NAMES, vectors, np.array([0, 0, 1, 1, 2, 2]))
    return Evaluator(classifier, pixels, Reference.of(rows, 3), Bootstrap(200, 0), gallery)


@pytest.fixture(scope="module")
def samples() -> dict[tuple[str, str], SampleFeatures]:
    groups = {}
    for label, style in enumerate(NAMES):
        right, wrong = clusters(label, 6, seed=1), clusters((label + 1) % 3, 6, seed=2)
        groups["retrieval", style] = samples_of(right, gray=label)
        groups["suffix", style] = samples_of(np.concatenate([right[:3], wrong[:3]]), gray=label)
        groups["suffix_retrieval", style] = samples_of(np.concatenate([right[:4], wrong[:2]]))
        # Without neighbors every sample looks like the first style.
        groups["no_neighbors", style] = samples_of(clusters(0, 6, seed=3))
    return groups


@pytest.fixture(scope="module")
def result(samples, evaluator):
    return results(samples, evaluator)


def test_accuracies_are_the_shares_of_correct_samples_by_each_judge(result):
    accuracies = {mode: row["accuracy"].value for mode, row in result["modes"].items()}
    assert accuracies == pytest.approx(dict(zip(MODES, (1, 1 / 2, 2 / 3, 1 / 3), strict=True)))
    by_pixels = {mode: row["accuracy_pixels"].value for mode, row in result["modes"].items()}
    assert by_pixels == pytest.approx(dict(zip(MODES, (1, 1, 1 / 3, 1 / 3), strict=True)))
    assert (result["num_styles"], result["chance"]) == (3, pytest.approx(1 / 3))
    assert result["judges"]["clip"]["accuracy"].value >= 0.95
    assert result["judges"]["pixels"] == {"accuracy": share([1] * 30), "held_out_rows": 30}


def test_the_style_of_the_nearest_picture_is_compared_with_the_requested_style(result):
    nearest = {mode: row["accuracy_nearest"].value for mode, row in result["modes"].items()}
    assert nearest == pytest.approx(dict(zip(MODES, (1, 1, 1 / 3, 1 / 3), strict=True)))
    assert result["judges"]["descriptor"] == {"retrieval": share([1] * 6), "gallery_rows": 6}
    assert [row["retrieval"] for row in result["styles"]] == [share([1] * 2)] * 3


def test_content_and_style_is_the_product_of_both_distances_plus_one(samples, result):
    scale = np.float32(3**0.5)
    for mode in ("retrieval", "suffix_retrieval"):
        gray = [0, 1, 2] if mode == "retrieval" else [0, 0, 0]
        content, style = [], []
        for label, name in enumerate(NAMES):
            plain, pictures = samples["no_neighbors", name].pictures, samples[mode, name].pictures
            content.append(1 - np.sum(pictures * plain, axis=1, dtype=np.float64))
            rows, real = np.eye(3, dtype=np.float32)[[gray[label]] * 6], np.eye(3, dtype=np.float32)[[label] * 2]
            style.append(KernelDistance.of(scale * rows, scale * real).value())
        value, low, high = result["modes"][mode]["content_and_style"]
        assert value == pytest.approx((1 + np.mean(content)) * (1 + np.mean(style)))
        assert low < value < high
    plain = result["modes"]["no_neighbors"]["content_and_style"]
    assert result["modes"]["retrieval"]["content_and_style"].high < plain.low


def test_intervals_are_by_prompt_and_differences_are_paired(result):
    row = result["styles"][1]["modes"]["suffix"]
    assert (row["samples"], row["prompts"]) == (6, 3)
    assert row["accuracy"] == share([1, 1, 1, 0, 0, 0], SIX_PROMPTS)
    # Three prompts say less than 18 samples.
    low, high = result["modes"]["suffix"]["accuracy"][1:]
    assert high - low > share([1] * 9 + [0] * 9).high - share([1] * 9 + [0] * 9).low
    value, low, high = result["effect"]["suffix_retrieval"]
    assert value == pytest.approx(1 / 3)
    assert low <= 0 < high
    assert result["effect_pixels"]["suffix"].value == 0
    assert result["effect_pixels"]["suffix_retrieval"].value == pytest.approx(2 / 3)


def test_without_a_judge_on_pixels_its_values_are_none(samples, evaluator):
    result = results(samples, replace(evaluator, pixel_classifier=None, gallery=None))
    assert result["judges"]["pixels"] is result["judges"]["descriptor"] is result["effect_pixels"] is None
    row = result["modes"]["retrieval"]
    assert row["accuracy_pixels"] is row["accuracy_nearest"] is row["content_and_style"] is None


def test_one_prompt_tells_no_interval_of_means_and_pages_and_charts_say_so(samples, evaluator):
    of_one_prompt = {key: replace(group, prompts=("one prompt",) * 6) for key, group in samples.items()}
    result = json.loads(json.dumps(results(of_one_prompt, evaluator), allow_nan=False))
    values = result["modes"]["retrieval"]
    assert [values[name][1:] for name in ("logit", "clip_score", "kernel_distance")] == [[None, None]] * 3
    assert estimate_text(values["logit"]) == f"{values['logit'][0]:.3f} (interval unknown)"
    assert values["accuracy"][1] < values["accuracy"][2]
    assert result["relative_improvement"]["value"] is not None
    assert result["relative_improvement"]["interval"] is None
    assert Image.open(io.BytesIO(improvement_chart(result))).width > 0


def test_improvements_follow_from_the_accuracies(result):
    assert result["relative_improvement"]["value"] == pytest.approx(1.0)
    assert result["styles"][1]["relative_improvement"]["value"] == pytest.approx(1.0)


def test_a_style_without_success_of_the_baseline_has_no_relative_improvement(samples, evaluator):
    missed = samples | {("suffix", NAMES[0]): samples_of(clusters(1, 6, seed=4))}
    result = results(missed, evaluator)
    assert result["styles"][0]["relative_improvement"] == {"value": None, "interval": None}
    assert result["styles"][1]["relative_improvement"]["value"] == pytest.approx(1.0)


def test_logits_and_distances_are_better_for_samples_like_the_databases(samples, evaluator, result):
    modes = result["modes"]
    assert modes["retrieval"]["logit"].value > modes["suffix"]["logit"].value > modes["no_neighbors"]["logit"].value
    assert modes["retrieval"]["recall"].value > modes["no_neighbors"]["recall"].value
    distances = [modes[mode]["kernel_distance"] for mode in ("retrieval", "suffix_retrieval", "suffix")]
    assert distances == sorted(distances)
    assert distances[0].high < distances[1].value
    expected = [
        KernelDistance.of(4 * samples["suffix", style].pictures, 4 * evaluator.reference.by_style[style]).value()
        for style in NAMES
    ]
    assert distances[2].value == pytest.approx(np.mean(expected))


def test_a_second_distance_is_to_pictures_of_the_style_that_are_in_no_database(samples, evaluator, result):
    assert result["modes"]["retrieval"]["kernel_distance_held_out"] is None
    # Samples that are rows of the database.
    copied = samples | {
        ("retrieval", style): samples_of(rows[:6]) for style, rows in evaluator.reference.by_style.items()
    }
    real = {style: clusters(label, 20, seed=9) for label, style in enumerate(NAMES)}
    with_real = replace(evaluator, reference=replace(evaluator.reference, held_out=real))
    row = results(copied, with_real)["modes"]["retrieval"]
    expected = [KernelDistance.of(4 * copied["retrieval", style].pictures, 4 * real[style]).value() for style in NAMES]
    value, low, high = row["kernel_distance_held_out"]
    assert value == pytest.approx(np.mean(expected))
    assert low < value < high
    assert row["kernel_distance"] == results(copied, evaluator)["modes"]["retrieval"]["kernel_distance"]


def test_samples_in_the_styles_of_other_databases_are_far_although_all_styles_together_are_equal(samples, evaluator):
    """A distance to all databases at once would find nothing wrong with samples of interchanged styles."""
    turned = samples | {("suffix", style): samples_of(clusters((i + 1) % 3, 6, 1)) for i, style in enumerate(NAMES)}
    modes = results(turned, evaluator)["modes"]
    assert modes["suffix"]["kernel_distance"].low > modes["retrieval"]["kernel_distance"].high + 0.5


def test_the_clip_score_pairs_each_picture_with_its_prompt(samples, result):
    features = samples["retrieval", NAMES[2]]
    expected = np.mean([picture @ text for picture, text in zip(features.pictures, features.texts, strict=True)])
    assert result["styles"][2]["modes"]["retrieval"]["clip_score"].value == pytest.approx(expected, abs=1e-6)


def test_the_bar_chart_is_wider_for_more_styles(result):
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
    classifiers = ("classifier.safetensors", "pixel_classifier.safetensors", "pixel_classifier.json")
    for name in ("evaluation.json", "bars.png", "retrieval.png", "no_neighbors.png", *classifiers):
        assert f"{STAGE}/{name}" in manifest.checksums()
    for number, (prompt, seed) in enumerate(draw_prompts(PROMPTS, 4, "deep_red", seed=0)):
        with root.open(f"{STAGE}/samples/suffix/deep_red/{number:04d}.png") as file:
            recipe = read_recipe(file.read())
        assert (recipe["prompt"], recipe["seed"]) == (f"{prompt} in the style of deep red", seed)
    assert [row["style"] for row in result["styles"]] == list(NAMES)
    assert result["num_styles"] == 3
    # Without neighbors the untrained model draws the same style for all.
    for accuracy in ("accuracy", "accuracy_pixels"):
        assert result["modes"]["no_neighbors"][accuracy][0] == pytest.approx(1 / 3, abs=0.34)


def test_the_second_distance_is_to_the_pictures_of_the_judge_on_pixels_as_clip_sees_them(evaluated, tiny):
    root, _, result = evaluated
    encoder = Sampler.open(root, tiny[1]).encoder
    for mode in MODES:
        distances = []
        for style in NAMES:
            with root.open(f"{STAGE}/samples/{mode}/{style}/features.npy") as file:
                drawn = np.load(file)
            real = encoder.encode_images(pictures_of(style, 10))
            scale = np.float32(drawn.shape[1] ** 0.5)
            distances.append(KernelDistance.of(scale * drawn, scale * real).value())
        assert result["modes"][mode]["kernel_distance_held_out"][0] == pytest.approx(np.mean(distances), abs=1e-4)


def test_the_classifier_learned_the_pictures_of_the_databases(evaluated, tiny):
    root, _, result = evaluated
    assert result["judges"]["clip"]["accuracy"][0] == 1.0
    assert result["judges"]["pixels"]["held_out_rows"] == 6
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


def test_hidden_pictures_train_no_judge(tmp_path):
    root, trained = write_run(tmp_path)
    green = Database.open(root.child("databases/green"))
    ids, vectors = green.rows_at(np.arange(len(green)))
    hide(green.root, ids[:10])
    rows = database_rows(EvaluateConfig(), Sampler.open(root, trained), NAMES)
    assert {style: len(part) for style, part in rows.items()} == {"deep_red": 24, "green": 14, "sky_blue": 24}
    np.testing.assert_allclose(rows["green"], vectors[10:], atol=1e-3)


def test_an_evaluation_with_images_that_are_hidden_later_is_not_finished(evaluated, tiny, prompts_file):
    root, manifest, _ = evaluated
    sky_blue = root.child("databases/sky_blue")
    hide(sky_blue, Database.open(sky_blue).ids_at(np.arange(2)))
    try:
        with pytest.raises(UserError, match=r"from another list of hidden images in databases/sky_blue.*--remake"):
            run(config(prompts_file), tiny[1], root)
    finally:
        sky_blue.delete(HIDDEN_FOLDER)
    assert run(config(prompts_file), tiny[1], root).checksums() == manifest.checksums()


def test_a_process_with_other_settings_draws_no_part(evaluated, tiny, prompts_file):
    with pytest.raises(UserError, match="evaluate was begun with k = 4, the recipe has 3"):
        draw_part(config(prompts_file, k=3), tiny[1], evaluated[0], Part(0, 2))


def test_fewer_than_two_styles_are_refused(tmp_path, prompts_file):
    with pytest.raises(UserError, match="at least 2"):
        style_names(config(prompts_file), Root(tmp_path))


def test_a_missing_prompts_file_is_refused(tiny):
    with pytest.raises(UserError, match="prompts_file is not set"):
        run(EvaluateConfig(), tiny[1], tiny[0])


def test_prompts_at_whose_end_clip_does_not_read_the_style_are_refused(tiny, tmp_path):
    longest = 16 - 2 - 6  # CLIP's context without start, end and "in the style of deep red"
    (tmp_path / "prompts.txt").write_text("\n".join(["stag " * longest, "stag " * (longest + 1)]))
    with pytest.raises(UserError, match=r"the end of 2 of 6 prompts that name one, such as 'stag stag .* deep red'"):
        run(config(str(tmp_path / "prompts.txt"), judge_pictures=""), tiny[1], tiny[0])


def test_more_manifold_neighbors_than_pictures_are_refused(tiny, prompts_file):
    wide = config(prompts_file, samples_per_style=100, precision_recall_neighbors=99)
    with pytest.raises(UserError, match="72 pictures in all"):
        run(wide, tiny[1], tiny[0])


def test_more_manifold_neighbors_than_samples_per_style_are_refused():
    with pytest.raises(ValidationError, match="less than samples_per_style 3"):
        EvaluateConfig(samples_per_style=3, precision_recall_neighbors=3)
