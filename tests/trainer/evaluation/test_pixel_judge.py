"""The judge on pixels: its table of pictures, its training, and its independence of CLIP."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from retrieval.errors import UserError
from tests.trainer.evaluation.judge_table import picture, write_judge_table
from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.pixel_judge import EDGE, JudgePictures, pictures_digest, thumbnails, train_pixel_judge
from trainer.evaluation.recipe import EvaluateConfig, PixelClassifierConfig

STYLES = ("checks", "dark_stripes")
CONFIG = PixelClassifierConfig(epochs=6, batch_size=8)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_judge_table(tmp_path_factory.mktemp("judge"), STYLES, 60)


def train(table: str, styles: Sequence[str], config: PixelClassifierConfig, seed: int = 0) -> TrainedClassifier:
    evaluation = EvaluateConfig(judge_pictures=table, pixel_classifier=config, seed=seed, reference_rows_per_style=100)
    return train_pixel_judge(JudgePictures.read(evaluation, styles), config, seed)


def test_textures_are_told_apart_on_held_out_and_new_pictures_sharp_and_blurred(table: str):
    trained = train(table, STYLES, CONFIG)
    assert trained.held_out_rows == 12
    assert trained.held_out_accuracy >= 0.9
    rng = np.random.default_rng(5)
    labels = np.arange(40) % 2
    pictures = [picture(STYLES[label], rng) for label in labels]
    smooth = [item.resize((48, 40)).resize(item.size) for item in pictures]
    for variant in (pictures, smooth):
        assert np.mean(trained.network.logits(thumbnails(variant)).argmax(1) == labels) >= 0.9


def test_the_seed_decides_the_judge_and_the_global_generator_stays(table: str):
    before = torch.random.get_rng_state()
    quick = PixelClassifierConfig(epochs=1, batch_size=16)
    first, second, other = (train(table, STYLES, quick, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    pixels = np.zeros((1, EDGE, EDGE, 3), np.uint8)
    np.testing.assert_array_equal(first.network.logits(pixels), second.network.logits(pixels))
    assert not np.array_equal(first.network.logits(pixels), other.network.logits(pixels))


def test_a_limit_of_rows_holds_for_each_style(table: str):
    half = PixelClassifierConfig(held_out_fraction=0.5)
    config = EvaluateConfig(judge_pictures=table, pixel_classifier=half, reference_rows_per_style=10)
    pictures = JudgePictures.read(config, STYLES)
    assert np.bincount(pictures.labels).tolist() == [10, 10]
    assert np.bincount(pictures.labels[pictures.held_out]).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("styles", "message"),
    [(("checks", "unknown"), "no picture of style 'unknown'"), (("checks", "rare"), "has 1 pictures")],
)
def test_a_style_without_enough_pictures_is_refused(table: str, tmp_path: Path, styles, message):
    rows = pq.read_table(table).to_pydict()
    rows = {"path": [*rows["path"], "0.png"], "style": [*rows["style"], "rare"]}
    path = Path(table).with_name("rare.parquet")
    pq.write_table(pa.table(rows), path)
    with pytest.raises(UserError, match=message):
        train(str(path), styles, CONFIG)


@pytest.mark.parametrize("kind", ["missing", "no table", "other columns", "missing picture"])
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, kind: str):
    path = tmp_path / "pictures.parquet"
    if kind == "no table":
        path.write_text("path,style")
    elif kind == "other columns":
        pq.write_table(pa.table({"url": ["a"]}), path)
    elif kind == "missing picture":
        pq.write_table(pa.table({"path": ["a.png"] * 4, "style": ["checks"] * 4}), path)
    with pytest.raises(UserError, match=r"pictures\.parquet|a\.png"):
        train(str(path), ("checks",), CONFIG)
    if kind != "missing picture":
        with pytest.raises(UserError, match=r"pictures\.parquet"):
            pictures_digest(str(path))


def test_the_digest_changes_with_the_table_and_with_a_picture(tmp_path: Path):
    path = tmp_path / "pictures.parquet"
    pq.write_table(pa.table({"path": ["a.png"], "style": ["checks"]}), path)
    digests = {pictures_digest(str(path))}
    (tmp_path / "a.png").write_bytes(b"1234")
    digests.add(pictures_digest(str(path)))
    pq.write_table(pa.table({"path": ["a.png"], "style": ["stripes"]}), path)
    digests.add(pictures_digest(str(path)))
    assert len(digests) == 3
