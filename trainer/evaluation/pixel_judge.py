"""Style classifier on pixels: a judge that does not see the CLIP features that condition the samples.

Reads a Parquet table of labelled pictures that are in no database and no training set; writes no files. A small
convolutional network is trained on most of them and tested on the rest. The style descriptor has the same split: the
rest are the real pictures that it compares samples with.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional

from retrieval.errors import UserError
from retrieval.pictures.picture_file import read_picture
from trainer.evaluation.classifier import Labels, TrainedClassifier, fit, split_rows
from trainer.evaluation.metrics import Features
from trainer.evaluation.recipe import EvaluateConfig, PixelClassifierConfig
from trainer.evaluation.styles import style_words

EDGE = 64
CHANNELS = (16, 32, 64, 96)
MAX_SHIFT = 4
NOISE = 0.05
BLOCK = 256
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class JudgePictures:
    """Labelled pictures, of which some are held out to test what the others train, and to compare samples with."""

    styles: tuple[str, ...]
    paths: tuple[Path, ...]
    """(n,) files."""
    pixels: Pixels
    """(n, EDGE, EDGE, 3)."""
    labels: Labels
    """(n,) positions in `styles`."""
    rows: Labels
    """Sorted numbers of the pictures for training."""
    held_out: Labels
    """Sorted numbers of all others."""

    @classmethod
    def read(cls, config: EvaluateConfig, styles: Sequence[str]) -> "JudgePictures":
        """Read the table of the recipe, at most `reference_rows_per_style` pictures of each style.

        Raises UserError if it cannot be read, or has too few pictures of a style.
        """
        paths, labels = _rows(config, styles)
        pixels = thumbnails(read_picture(path) for path in paths)
        rows, held_out = split_rows(labels, config.pixel_classifier.held_out_fraction, config.seed)
        return cls(tuple(styles), tuple(paths), pixels, labels, rows, held_out)


class PixelClassifier(torch.nn.Module):
    """Four strided convolutions, the mean over the picture, and a linear layer.

    In training, pictures are mirrored, blurred, shifted and noised at random: samples are less sharp than real ones.
    """

    def __init__(self, styles: tuple[str, ...], dropout: float) -> None:
        super().__init__()
        self.styles = styles
        self.layers = make_layers(dropout, len(styles))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (n, styles) of pixels (n, EDGE, EDGE, 3) uint8."""
        logits: torch.Tensor = self.layers(as_input(pixels, self.training))
        return logits

    @torch.inference_mode()
    def logits(self, rows: npt.NDArray[Any]) -> Features:
        """Logits (n, styles) float32 of pixels (n, EDGE, EDGE, 3) uint8, in the order of `styles`."""
        blocks = torch.from_numpy(rows).split(BLOCK)
        return np.concatenate([self(block).numpy() for block in blocks])


def make_layers(dropout: float, outputs: int) -> torch.nn.Sequential:
    """The layers from pictures (n, 3, EDGE, EDGE) to (n, outputs)."""
    layers: list[torch.nn.Module] = []
    for inputs, channels in zip((3, *CHANNELS), CHANNELS, strict=False):
        layers += [torch.nn.Conv2d(inputs, channels, 3, 2, 1), torch.nn.BatchNorm2d(channels), torch.nn.ReLU()]
    pooling = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(dropout))
    return torch.nn.Sequential(*layers, *pooling, torch.nn.Linear(CHANNELS[-1], outputs))


def as_input(pixels: torch.Tensor, augment: bool) -> torch.Tensor:
    """Pixels (n, EDGE, EDGE, 3) uint8 as pictures (n, 3, EDGE, EDGE) from -1 to 1. augment: change them at random."""
    pictures = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return _augmented(pictures) if augment else pictures


def train_pixel_judge(pictures: JudgePictures, config: PixelClassifierConfig, seed: int) -> TrainedClassifier:
    """Train on some of the pictures and test on the others."""
    pixels, labels, rows, held_out = pictures.pixels, pictures.labels, pictures.rows, pictures.held_out
    network = fit(lambda: PixelClassifier(pictures.styles, config.dropout), pixels[rows], labels[rows], config, seed)
    return TrainedClassifier.test(network, pixels[held_out], labels[held_out])


def thumbnails(pictures: Iterable[Image.Image]) -> Pixels:
    """Pictures scaled to the input of the network: (n, EDGE, EDGE, 3)."""
    small = (picture.convert("RGB").resize((EDGE, EDGE), Image.Resampling.LANCZOS) for picture in pictures)
    return np.stack([np.asarray(picture, np.uint8) for picture in small])


def pictures_digest(table: str) -> str:
    """Hash of a table and of the sizes of its pictures, 16 hex digits: changes with the data of the judge.

    Raises UserError if the table cannot be read.
    """
    rows = _read(table)
    digest = hashlib.sha256(Path(table).read_bytes())
    for path, _ in rows:
        digest.update(f"{path} {path.stat().st_size if path.exists() else -1}\n".encode())
    return digest.hexdigest()[:16]


def _augmented(pictures: torch.Tensor) -> torch.Tensor:
    """Randomly changed pictures (n, 3, EDGE, EDGE)."""
    # For each picture, not for each batch: batches of blurred pictures alone would spoil the batch norm's averages.
    mirrored, blurred = torch.rand(2, len(pictures), 1, 1, 1) < 0.5
    pictures = torch.where(mirrored, pictures.flip(3), pictures)
    smooth = functional.avg_pool2d(functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = torch.where(blurred, smooth, pictures)
    padded = functional.pad(pictures, (MAX_SHIFT,) * 4, mode="reflect")
    x, y = torch.randint(0, 2 * MAX_SHIFT + 1, (2,)).tolist()
    return padded[:, :, y : y + EDGE, x : x + EDGE] + NOISE * torch.randn(pictures.shape)


def _rows(config: EvaluateConfig, styles: Sequence[str]) -> tuple[list[Path], Labels]:
    """Paths and labels of the pictures that are used, by style."""
    table = config.judge_pictures
    by_style: dict[str, list[Path]] = {style_words(style): [] for style in styles}
    for path, style in _read(table):
        if (words := style_words(style)) in by_style:
            by_style[words].append(path)
    paths: list[Path] = []
    labels: list[int] = []
    for label, words in enumerate(map(style_words, styles)):
        of_style = by_style[words]
        if not of_style:
            raise UserError(f"judge_pictures = {table!r} has no picture of style {words!r}. Add some.")
        order = np.random.default_rng([config.seed, label]).permutation(len(of_style))
        chosen = sorted(order[: config.reference_rows_per_style])
        paths += [of_style[number] for number in chosen]
        labels += [label] * len(chosen)
    return paths, np.array(labels, np.int64)


def _read(table: str) -> list[tuple[Path, str]]:
    """The rows of a table: path of the picture, and style."""
    try:
        columns = pq.read_table(table, columns=["path", "style"]).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"judge_pictures = {table!r} cannot be read: {error}. Wanted a Parquet table with columns path and style."
        ) from error
    pairs = zip(columns["path"], columns["style"], strict=True)
    return [(Path(table).parent / path, style) for path, style in pairs if path and style]
