"""The measures behind the paper's experiments, on data whose answers are known."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from retrieval.errors import UserError
from retrieval.storage.root import Root
from tests.trainer.tiny_run import pictures_of
from tests.trainer.training_set import make_recipe
from trainer.data.loader import Loader
from trainer.data.plan import make_plan
from trainer.evaluation.classifier import train_classifier
from trainer.evaluation.judgement import Reference, Shown
from trainer.evaluation.metrics import Gaussian, balls
from trainer.evaluation.paper.controls import (
    CONTROLS,
    OTHER_PROMPT,
    RANDOM_ROWS,
    SHUFFLED,
    control,
    deranged,
    random_rows,
)
from trainer.evaluation.paper.copying import Samples, Training, compare
from trainer.evaluation.paper.gallery import TrainingImages, style_picture
from trainer.evaluation.paper.held_out import held_out_losses, summary
from trainer.evaluation.paper.intervals import Bootstrap
from trainer.evaluation.paper.memorization import Comparison, hash_row, nearest
from trainer.evaluation.paper.memorization import summary as memorization_summary
from trainer.evaluation.paper.paper_tables import Ruler, tables
from trainer.evaluation.styles import MODES
from trainer.model.autoencoder import Autoencoder
from trainer.model.diffusion import alphas_bar
from trainer.sampling.conditioning import Conditioned
from trainer.sampling.recipe import ClassifierConfig
from trainer.sampling.request import Request

BOOTSTRAP = Bootstrap(200, 0)
NAMES = ("a", "b", "c")


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


# intervals


def test_an_interval_of_a_mean_is_as_wide_as_the_formula_says_and_its_seed_decides_it():
    values = np.random.default_rng(0).normal(3, 2, 400)
    value, low, high = Bootstrap(2000, 1).mean(values)
    assert value == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.08)
    assert Bootstrap(2000, 1).mean(values) == (value, low, high) != Bootstrap(2000, 2).mean(values)


def test_a_distances_interval_holds_the_true_one_though_drawing_rows_twice_only_adds():
    rng = np.random.default_rng(3)
    real, samples = rng.normal(0, 1, (4000, 12)), rng.normal(0, 1, (300, 12))
    samples[:, 0] += 1.0  # one unit apart, equal covariances: the squared distance is 1
    gaussian = Gaussian.fit(real)
    found = BOOTSTRAP.mirrored(lambda rows: gaussian.distance(samples[rows]), len(samples))
    assert found.low < 1.0 < found.high
    assert found.low < found.value < found.high
    assert abs(found.value - 1.0) < abs(gaussian.distance(samples) - 1.0)
    naive = BOOTSTRAP.percentiles(lambda rows: gaussian.distance(samples[rows]), len(samples))
    assert naive.value - naive.low < naive.high - naive.value


# controls


def told(style: str, number: int, prompt: str, vector: float) -> Conditioned:
    context = np.full((4, 2), vector, np.float32)
    context[0] = number
    return Conditioned(Request(prompt, database=style), (), context, np.ones(4, np.float32))


@pytest.fixture(scope="module")
def found() -> dict[str, list[Conditioned]]:
    """Three styles of five samples; neighbors say which style and sample they were found for."""
    return {
        style: [told(style, i, f"prompt {i % 3}", 100 * label + i) for i in range(5)]
        for label, style in enumerate(NAMES)
    }


def test_shuffled_neighbors_are_of_every_other_style_and_of_another_prompt(found):
    for label, style in enumerate(NAMES):
        given = control(SHUFFLED, style, found, [])
        donors = [int(one.context[1, 0]) for one in given]
        assert {donor // 100 for donor in donors} == {0, 1, 2} - {label}
        assert all((donor % 100) % 3 != i % 3 for i, donor in enumerate(donors))
        # what is asked stays: the request and the text's token
        assert [one.request for one in given] == [one.request for one in found[style]]
        assert [int(one.context[0, 0]) for one in given] == list(range(5))


def test_neighbors_of_another_prompt_stay_in_the_style(found):
    donors = [int(one.context[1, 0]) for one in control(OTHER_PROMPT, "b", found, [])]
    assert {donor // 100 for donor in donors} == {1}
    assert all((donor % 100) % 3 != i % 3 for i, donor in enumerate(donors))


def test_random_neighbors_are_different_rows_that_the_database_shows(found):
    table = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)

    class Rows:
        hidden = np.array([4, 6, 99])

        def __len__(self) -> int:
            return len(table)

        def rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return positions, table[positions]

    drawn = random_rows(Rows(), [3] * 5, np.random.default_rng(1))
    given = control(RANDOM_ROWS, "a", found, drawn)
    for one, rows in zip(given, drawn, strict=True):
        np.testing.assert_array_equal(one.context[1:], rows)
        assert len(np.unique(rows, axis=0)) == 3
        assert not np.isin(rows, table[[4, 6]]).any()
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_single_prompt_leaves_nothing_to_shuffle():
    one = {style: [told(style, i, "same", i) for i in range(3)] for style in NAMES}
    with pytest.raises(UserError, match="at least 2 different prompts"):
        control(SHUFFLED, "a", one, [])


def test_a_derangement_leaves_none_in_its_place():
    for count in range(2, 20):
        order = deranged(count, np.random.default_rng(count))
        assert sorted(order) == list(range(count))
        assert (order != np.arange(count)).all()


# judged


def clusters(label: int, count: int, seed: int) -> np.ndarray:
    centers = np.random.default_rng(7).standard_normal((3, 16))
    return unit(centers[label] + 0.2 * np.random.default_rng([seed, label]).standard_normal((count, 16)))


def test_tables_tell_the_effect_and_whose_neighbors_shuffled_samples_follow():
    features = np.concatenate([clusters(label, 60, seed=0) for label in range(3)])
    judge = train_classifier(
        features, np.repeat(np.arange(3), 60), NAMES, ClassifierConfig(hidden=32), seed=0
    )
    texts = unit(np.random.default_rng(3).standard_normal((6, 16)))
    shown = {}
    for label, style in enumerate(NAMES):
        for mode in (*MODES, *CONTROLS):
            shown[mode, style] = Shown(clusters(label, 6, seed=1), texts)
        half = np.concatenate([clusters(label, 3, seed=2), clusters((label + 1) % 3, 3, seed=2)])
        shown["suffix", style] = Shown(half, texts)
        # shuffled samples get the neighbors of the next style and of the one after it in turn, and follow
        parts = [clusters((label + 1 + i % 2) % 3, 6, seed=4)[i] for i in range(6)]
        shown[SHUFFLED, style] = Shown(np.stack(parts), texts)
    result = tables(shown, Ruler(judge, Reference(features, balls(features, 3), 3), BOOTSTRAP))
    assert result["modes"]["retrieval"]["accuracy"][0] == 1.0
    assert result["effect"][SHUFFLED] == (1.0, 1.0, 1.0)
    value, low, high = result["effect"]["suffix"]
    assert value == 0.5
    assert 0.2 < low < 0.5 < high < 0.8
    assert result["relative_improvement"]["value"] == pytest.approx(1.0)
    assert result["shuffled_follows_its_neighbors"][0] == 1.0
    assert result["modes"][SHUFFLED]["logit"][2] < result["modes"]["retrieval"]["logit"][1]
    assert [row["style"] for row in result["styles"]] == list(NAMES)


# memorization


def test_the_nearest_is_what_brute_force_finds_and_never_the_row_itself():
    rows = unit(np.random.default_rng(5).standard_normal((40, 8)))
    queries = unit(np.random.default_rng(6).standard_normal((7, 8)))
    cosines = queries @ rows.T
    found = nearest(queries, rows)
    np.testing.assert_array_equal(found.rows, cosines.argmax(1))
    np.testing.assert_allclose(found.distances, 1 - cosines.max(1), atol=1e-6)
    among = nearest(rows, rows, among_themselves=True)
    assert (among.rows != np.arange(40)).all()
    assert among.distances.min() > 1e-3


def test_a_hash_survives_scaling_and_light_and_tells_pictures_apart():
    first, second = pictures_of("green", 2)
    brighter = ImageEnhance.Brightness(first.resize((50, 50))).enhance(1.15)
    alike, other = (32 * (1 - hash_row(first) @ hash_row(one)) for one in (brighter, second))
    assert alike <= 12  # of 64, in noise, where every wave is weak
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


def test_a_planted_copy_is_the_closest_pair_by_clip_and_by_hash(tmp_path: Path):
    root, pictures, ids = Root(tmp_path), pictures_of("green", 12), tuple(range(5, 17))
    write_tar(root, "00000", ids, pictures)
    features = unit(np.random.default_rng(1).standard_normal((14, 16)))
    images = TrainingImages(("00000",) * 12, ids, features[:12])
    drawn = [*pictures_of("deep_red", 2), pictures[7]]
    for i, picture in enumerate(drawn):
        picture.save(root.local_path(f"{i}.png"))
    names = tuple(f"{i}.png" for i in range(3))
    samples = Samples(root, names, ("green",) * 3, features[[12, 13, 7]], ())
    compared = compare(samples, Training(root, images), 2)
    assert [one.name for one, _ in compared] == ["training_clip", "training_hash"]
    for one, grid in compared:
        assert one.scaled(one.samples).argmin() == 2
        assert one.samples[2] == pytest.approx(0, abs=2 / 32)
        assert np.median(one.real) > 3 * one.samples[2]
        (sample, _), (source, _) = grid.cells
        assert np.abs(np.asarray(sample, float) - np.asarray(source, float)).mean() < 12
    copied = memorization_summary(compared[0][0], BOOTSTRAP)
    assert copied["share_nearer"][0] == pytest.approx(1 / 3)


def test_real_images_that_stand_twice_do_not_hide_a_model_that_copies():
    real = np.concatenate([np.zeros(50), np.linspace(0.02, 0.2, 50)])
    copies = memorization_summary(Comparison("training_clip", np.zeros(10), real), BOOTSTRAP)
    assert copies["near"] > 0.02
    assert copies["share_nearer"][0] == 1


def test_pictures_that_show_nothing_are_near_no_other():
    flat = hash_row(Image.new("RGB", (40, 40), "gray"))
    assert 32 * (1 - flat @ flat) == 32


def test_a_styles_picture_is_found_by_its_name_or_words_and_never_outside(tmp_path: Path):
    (tmp_path / "styles/pixel art").mkdir(parents=True)
    (tmp_path / "styles/pixel art/a.png").touch()
    (tmp_path / "secret.png").touch()
    folder = str(tmp_path / "styles")
    assert style_picture(folder, "pixel_art", "pixel_art/a.png") == tmp_path / "styles/pixel art/a.png"
    assert style_picture(folder, "pixel_art", "pixel_art/../../secret.png") is None
    assert style_picture(folder, "chalk", "chalk/a.png") is None
    assert style_picture("", "pixel_art", "pixel_art/a.png") is None


# what neighbors add to the loss


class Believes(torch.nn.Module):
    """Predicts as if the latent were what its context says, as in the training set that is written."""

    def __init__(self, abar: torch.Tensor) -> None:
        super().__init__()
        self.abar = torch.nn.Parameter(abar)

    def forward(
        self, x_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        x_0 = 5 * context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        abar_t = self.abar[t].view(-1, 1, 1, 1)
        return ((x_t - abar_t.sqrt() * x_0) / (1 - abar_t).sqrt(),)


def test_own_neighbors_give_the_least_loss_and_draws_are_shared(training_set: Root, autoencoder_folder: str):
    recipe = make_recipe(autoencoder_folder, validation_images=12)
    autoencoder = Autoencoder.load(recipe.autoencoder, "cpu")
    plan = make_plan(recipe, training_set, autoencoder)
    unet, loader = Believes(alphas_bar(recipe.diffusion)), Loader(plan, training_set, 0, 1)
    losses = held_out_losses(unet, plan, loader, autoencoder, 4)
    assert {values.shape for values in losses.values()} == {(12, 4)}
    found = summary(losses, BOOTSTRAP)
    for name in ("shuffled", "none"):
        value, low, high = found["added"][name]
        assert value == pytest.approx(float((losses[name] - losses["true"]).mean()))
        assert 0 < low < value < high
        # the same wrong belief weighs most where there is least noise
        quartiles = [one[0] for one in found["added_by_quartile"][name]]
        assert quartiles == sorted(quartiles, reverse=True)
    again = held_out_losses(unet, plan, loader, autoencoder, 4)
    np.testing.assert_array_equal(again["shuffled"], losses["shuffled"])
