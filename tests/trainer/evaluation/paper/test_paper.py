"""The measurements of the paper's experiments on data with known results."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from retrieval.clip.encoder import Encoder
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, write_manifest
from retrieval.storage.root import Root
from tests.trainer.tiny_run import pictures_of, write_clip, write_style_database
from tests.trainer.training_set import make_recipe
from trainer.data.loader import Loader
from trainer.data.plan import make_plan
from trainer.evaluation.classifier import train_classifier
from trainer.evaluation.intervals import Bootstrap
from trainer.evaluation.paper.controls import (
    CONTROLS,
    OTHER_PROMPT,
    RANDOM_ROWS,
    SHUFFLED,
    control,
    derangement,
    random_rows,
    tables,
)
from trainer.evaluation.paper.copy_check import DatabaseImages, GeneratedSamples, TrainingSetImages, compare
from trainer.evaluation.paper.copy_distances import Comparison, hash_row, nearest
from trainer.evaluation.paper.copy_distances import summary as copy_summary
from trainer.evaluation.paper.experiments import Experiments
from trainer.evaluation.paper.held_out import held_out_losses, summary
from trainer.evaluation.paper.real_images import TrainingImages, style_picture
from trainer.evaluation.recipe import ClassifierConfig
from trainer.evaluation.scores import Evaluator, Reference, SampleFeatures
from trainer.evaluation.styles import MODES
from trainer.model.autoencoder import Autoencoder
from trainer.model.diffusion import alphas_bar
from trainer.sampling.conditioning import ConditionedRequest
from trainer.sampling.request import Neighbor, Request

BOOTSTRAP = Bootstrap(200, 0)
NAMES = ("a", "b", "c")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


# controls


def conditioned(style: str, number: int, prompt: str, vector: float) -> ConditionedRequest:
    context = np.full((4, 2), vector, np.float32)
    context[0] = number
    return ConditionedRequest(Request(prompt, database=style), (), context, np.ones(4, np.float32))


@pytest.fixture(scope="module")
def requests() -> dict[str, list[ConditionedRequest]]:
    """Five requests of each style; the value of a neighbor is 100 * style + number of the request."""
    return {
        style: [conditioned(style, i, f"prompt {i % 3}", 100 * label + i) for i in range(5)]
        for label, style in enumerate(NAMES)
    }


def test_shuffled_neighbors_come_from_all_other_styles_and_from_another_prompt(requests):
    for label, style in enumerate(NAMES):
        shuffled = control(SHUFFLED, style, requests, [])
        donors = [int(request.context[1, 0]) for request in shuffled]
        assert {donor // 100 for donor in donors} == {0, 1, 2} - {label}
        assert all((donor % 100) % 3 != i % 3 for i, donor in enumerate(donors))
        # The request and the token of its prompt are unchanged.
        assert [item.request for item in shuffled] == [item.request for item in requests[style]]
        assert [int(item.context[0, 0]) for item in shuffled] == list(range(5))


def test_neighbors_of_another_prompt_come_from_the_same_style(requests):
    donors = [int(item.context[1, 0]) for item in control(OTHER_PROMPT, "b", requests, [])]
    assert {donor // 100 for donor in donors} == {1}
    assert all((donor % 100) % 3 != i % 3 for i, donor in enumerate(donors))


def test_random_neighbors_are_distinct_rows_that_are_not_hidden(requests):
    table = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)

    class Rows:
        hidden = np.array([4, 6, 99])

        def __len__(self) -> int:
            return len(table)

        def rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return positions, table[positions]

    drawn = random_rows(Rows(), [3] * 5, np.random.default_rng(1))
    changed = control(RANDOM_ROWS, "a", requests, drawn)
    for item, rows in zip(changed, drawn, strict=True):
        np.testing.assert_array_equal(item.context[1:], rows)
        assert len(np.unique(rows, axis=0)) == 3
        assert not np.isin(rows, table[[4, 6]]).any()
    assert not np.array_equal(drawn[0], drawn[1])


def test_neighbors_of_controls_have_the_weight_of_the_evaluation(requests):
    faint = {
        style: [replace(item, request=replace(item.request, neighbor_weight=0.5)) for item in items]
        for style, items in requests.items()
    }
    rows = [np.zeros((3, 2), np.float32)] * 5
    for name in CONTROLS:
        for item in control(name, "a", faint, rows):
            assert item.weights.tolist() == [1, 0.5, 0.5, 0.5]


def test_controls_with_a_single_prompt_are_refused():
    single = {style: [conditioned(style, i, "same", i) for i in range(3)] for style in NAMES}
    with pytest.raises(UserError, match="at least 2 different prompts"):
        control(SHUFFLED, "a", single, [])


def test_a_derangement_has_no_fixed_point():
    for count in range(2, 20):
        order = derangement(count, np.random.default_rng(count))
        assert sorted(order) == list(range(count))
        assert (order != np.arange(count)).all()


# tables


def clusters(label: int, count: int, seed: int) -> np.ndarray:
    centers = np.random.default_rng(7).standard_normal((3, 16))
    return unit(centers[label] + 0.2 * np.random.default_rng([seed, label]).standard_normal((count, 16)))


def test_tables_have_the_effect_and_the_style_of_shuffled_samples():
    rows = {style: clusters(label, 60, seed=0) for label, style in enumerate(NAMES)}
    features, labels = np.concatenate([*rows.values()]), np.repeat(np.arange(3), 60)
    classifier = train_classifier(features, labels, NAMES, ClassifierConfig(hidden=32), seed=0)

    def group(pictures: np.ndarray) -> SampleFeatures:
        texts = unit(np.random.default_rng(3).standard_normal((6, 16)))
        return SampleFeatures(pictures, texts, tuple("abcdef"), np.zeros((6, 64, 64, 3), np.uint8))

    samples = {}
    for label, style in enumerate(NAMES):
        for mode in (*MODES, *CONTROLS):
            samples[mode, style] = group(clusters(label, 6, seed=1))
        half = np.concatenate([clusters(label, 3, seed=2), clusters((label + 1) % 3, 3, seed=2)])
        samples["suffix", style] = group(half)
        # Shuffled samples have the neighbors of the next two styles alternately, and their style.
        samples[SHUFFLED, style] = group(np.stack([clusters((label + 1 + i % 2) % 3, 6, seed=4)[i] for i in range(6)]))
    result = tables(samples, Evaluator(classifier, None, Reference.of(rows, 3), BOOTSTRAP))
    assert result["modes"]["retrieval"]["accuracy"][0] == 1.0
    value, low, high = result["effect"][SHUFFLED]
    assert value == high == 1.0
    assert 0.5 < low < 1
    value, low, high = result["effect"]["suffix"]
    assert value == 0.5
    assert 0 <= low < 0.5 < high <= 1
    assert result["effect"]["suffix_retrieval"][0] == 0
    assert result["effect"]["suffix_retrieval"][1] < 0 < result["effect"]["suffix_retrieval"][2]
    assert result["relative_improvement"]["value"] == pytest.approx(1.0)
    assert result["shuffled_follows_its_neighbors"][0] == 1.0
    assert result["modes"][SHUFFLED]["logit"][2] < result["modes"]["retrieval"]["logit"][1]
    assert [row["style"] for row in result["styles"]] == list(NAMES)


# copies


def test_the_nearest_row_is_that_of_brute_force_and_never_the_row_itself():
    rows = unit(np.random.default_rng(5).standard_normal((40, 8)))
    queries = unit(np.random.default_rng(6).standard_normal((7, 8)))
    cosines = queries @ rows.T
    result = nearest(queries, rows)
    np.testing.assert_array_equal(result.rows, cosines.argmax(1))
    np.testing.assert_allclose(result.distances, 1 - cosines.max(1), atol=1e-6)
    others = nearest(rows, rows, same_rows=True)
    assert (others.rows != np.arange(40)).all()
    assert others.distances.min() > 1e-3


def test_a_hash_changes_little_with_scale_and_brightness_and_much_with_the_picture():
    first, second = pictures_of("green", 2)
    brighter = ImageEnhance.Brightness(first.resize((50, 50))).enhance(1.15)
    alike, other = (32 * (1 - hash_row(first) @ hash_row(picture)) for picture in (brighter, second))
    assert alike <= 12  # Of 64 bits, in a noise picture with weak waves only.
    assert other >= 16


def write_tar(root: Root, shard: str, ids: tuple[int, ...], pictures: list[Image.Image]) -> None:
    root.local_path("download/train").mkdir(parents=True)
    with tarfile.open(root.local_path(f"download/train/{shard}.tar"), "w") as tar:
        for image_id, picture in zip(ids, pictures, strict=True):
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=95, subsampling=0)
            member = tarfile.TarInfo(f"{image_id:016x}.jpg")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)


def test_an_inserted_copy_is_the_closest_pair_by_clip_and_by_hash(tmp_path: Path):
    root, pictures, ids = Root(tmp_path), pictures_of("green", 12), tuple(range(5, 17))
    write_tar(root, "00000", ids, pictures)
    features = unit(np.random.default_rng(1).standard_normal((14, 16)))
    images = TrainingImages(("00000",) * 12, ids, features[:12])
    drawn = [*pictures_of("deep_red", 2), pictures[7]]
    for i, picture in enumerate(drawn):
        picture.save(root.local_path(f"{i}.png"))
    names = tuple(f"{i}.png" for i in range(3))
    requests = tuple(conditioned("green", 0, prompt, 1) for prompt in ("a star", "a star", "a circle"))
    samples = GeneratedSamples(root, names, ("green",) * 3, features[[12, 13, 7]], requests)
    compared = compare(samples, TrainingSetImages(root, images), 2)
    assert [comparison.name for comparison, _ in compared] == ["training_clip", "training_hash"]
    for comparison, grid in compared:
        assert comparison.scaled(comparison.samples).argmin() == 2
        assert comparison.samples[2] == pytest.approx(0, abs=2 / 32)
        assert np.median(comparison.real) > 3 * comparison.samples[2]
        (sample, _), (source, _) = grid.cells
        assert np.abs(np.asarray(sample, float) - np.asarray(source, float)).mean() < 12
    copied = copy_summary(compared[0][0], BOOTSTRAP)
    assert copied["share_nearer"][0] == pytest.approx(1 / 3)
    assert compared[0][0].prompts == ("a star", "a star", "a circle")


@pytest.mark.parametrize("norm", [1, 9])
def test_further_real_images_are_as_near_to_their_database_as_its_images_to_each_other(tmp_path: Path, norm: int):
    """norm: length of the tokens, which a model may take as CLIP gives them."""
    encoder, root, pictures = Encoder(write_clip(tmp_path / "clip")), Root(tmp_path), pictures_of("green", 140)
    write_style_database(root, "databases/green", encoder, ["green"], 100)
    for i, picture in enumerate(pictures):
        path = root.local_path(f"samples/{i - 100}.png" if i >= 100 else f"styles/green/example.org/green-{i}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG")
    database = Database.open(root.child("databases/green"))
    (ids, vectors), urls = database.rows_at(np.arange(4)), database.metadata_at(np.arange(4))["url"].to_pylist()
    neighbors = tuple(Neighbor(int(each), 0.5, url, "") for each, url in zip(ids, urls, strict=True))
    context = norm * np.concatenate([vectors[:1], vectors])
    request = ConditionedRequest(Request("a star", database="green"), neighbors, context, np.ones(5, np.float32))
    names = tuple(f"samples/{i}.png" for i in range(40))
    features = encoder.encode_images(pictures[100:])
    samples = GeneratedSamples(root, names, ("green",) * 40, features, (request,) * 40)
    compared = compare(samples, DatabaseImages({"green": database}, str(tmp_path / "styles"), 50, 0), 2)
    assert [comparison.name for comparison, _ in compared] == ["database_clip", "database_hash"]
    for comparison, _ in compared:
        assert np.median(comparison.samples) == pytest.approx(np.median(comparison.real), rel=0.2)
    copied = replace(samples, features=np.repeat(vectors[2:3], 40, axis=0))
    assert DatabaseImages({"green": database}, "", 50, 0).by_clip(copied)[0].rows.tolist() == [2] * 40


def test_duplicate_real_images_do_not_hide_a_model_that_copies():
    real = np.concatenate([np.zeros(50), np.linspace(0.02, 0.2, 50)])
    copies = copy_summary(Comparison("training_clip", np.zeros(10), real, tuple("abcdefghij")), BOOTSTRAP)
    assert copies["near"] > 0.02
    assert copies["share_nearer"][0] == 1


def test_many_samples_of_a_few_prompts_do_not_narrow_the_intervals_of_copying():
    rng = np.random.default_rng(3)
    of_prompts, real = rng.uniform(0, 0.2, 20), np.linspace(0.1, 0.3, 200)
    prompts = tuple(f"prompt {i}" for i in range(20))
    few = copy_summary(Comparison("training_clip", of_prompts, real, prompts), BOOTSTRAP)
    repeated = Comparison("training_clip", np.repeat(of_prompts, 10), real, tuple(np.repeat(prompts, 10)))
    many = copy_summary(repeated, BOOTSTRAP)
    for name in ("median_samples", "share_nearer"):
        assert many[name] == pytest.approx(few[name], rel=0.05)
        assert few[name][1] < few[name][0] < few[name][2]


def test_blank_pictures_are_near_no_other():
    flat = hash_row(Image.new("RGB", (40, 40), "gray"))
    assert 32 * (1 - flat @ flat) == 32


def test_a_style_picture_is_found_by_name_or_words_and_only_inside_the_folder(tmp_path: Path):
    (tmp_path / "styles/pixel art").mkdir(parents=True)
    (tmp_path / "styles/pixel art/a.png").touch()
    (tmp_path / "secret.png").touch()
    folder = str(tmp_path / "styles")
    assert style_picture(folder, "pixel_art", "pixel_art/a.png") == tmp_path / "styles/pixel art/a.png"
    assert style_picture(folder, "pixel_art", "pixel_art/../../secret.png") is None
    assert style_picture(folder, "pixel_art", f"pixel_art/{tmp_path}/secret.png") is None
    assert style_picture(folder, "chalk", "chalk/a.png") is None
    assert style_picture("", "pixel_art", "pixel_art/a.png") is None


# held-out loss


class ContextIsLatent(torch.nn.Module):
    """Predicts the noise for the latent that the context encodes in the training set of these tests."""

    def __init__(self, abar: torch.Tensor) -> None:
        super().__init__()
        self.abar = torch.nn.Parameter(abar)

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        x_0 = 5 * context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        abar_t = self.abar[t].view(-1, 1, 1, 1)
        return ((x_t - abar_t.sqrt() * x_0) / (1 - abar_t).sqrt(),)


def test_own_neighbors_give_the_lowest_loss_and_contexts_share_the_noise(training_set: Root, autoencoder_folder: str):
    recipe = make_recipe(autoencoder_folder, validation_images=12)
    autoencoder = Autoencoder.load(recipe.autoencoder, "cpu")
    plan = make_plan(recipe, training_set, autoencoder)
    unet, loader = ContextIsLatent(alphas_bar(recipe.diffusion)), Loader(plan, training_set, 0, 1)
    losses = held_out_losses(unet, plan, loader, autoencoder, 4)
    assert {values.shape for values in losses.values()} == {(12, 4)}
    result = summary(losses, BOOTSTRAP)
    for name in ("shuffled", "none"):
        value, low, high = result["added"][name]
        assert value == pytest.approx(float((losses[name] - losses["true"]).mean()))
        assert 0 < low < value < high
        # The same wrong context costs most at the lowest noise.
        quartiles = [estimate[0] for estimate in result["added_by_quartile"][name]]
        assert quartiles == sorted(quartiles, reverse=True)
    repeated = held_out_losses(unet, plan, loader, autoencoder, 4)
    np.testing.assert_array_equal(repeated["shuffled"], losses["shuffled"])


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_held_out_images_are_left_out(training_set: Root, autoencoder_folder: str, count: int):
    recipe = make_recipe(autoencoder_folder, validation_images=count)
    autoencoder = Autoencoder.load(recipe.autoencoder, "cpu")
    plan = make_plan(recipe, training_set, autoencoder)
    run = Manifest(recipe.train.folder, 1, plan.fingerprint, plan.upstream, {}, (), {}, 0.0)
    write_manifest(training_set, run)
    experiments = object.__new__(Experiments)  # without the style databases that others need
    experiments._items = SimpleNamespace(root=training_set)
    experiments._sampler = SimpleNamespace(autoencoder=autoencoder)
    experiments._model = SimpleNamespace(training=recipe)
    try:
        values, pictures = experiments._held_out()
    finally:
        training_set.delete(recipe.train.folder)
    assert f"held out: {count}; wanted at least 2" in values["left_out"]
    assert pictures == {}
