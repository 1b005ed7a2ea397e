"""Style classifiers: the paper's two-layer perceptron on CLIP features (section 2.2, appendix C), and common training.

The perceptron is trained on features of the style databases; held-out rows measure its accuracy. Writes
`<folder>/<name>.safetensors` and `<name>.json`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save as save_tensors

from retrieval.errors import UserError
from retrieval.storage.root import FileRecord, Root
from trainer.evaluation.metrics import Features
from trainer.evaluation.recipe import ClassifierConfig, TrainingConfig

Labels = npt.NDArray[np.int64]
MIN_ROWS = 4


class Network(Protocol):
    """A classifier of rows: CLIP features, or pixels."""

    styles: tuple[str, ...]

    def logits(self, rows: npt.NDArray[Any]) -> Features:
        """Logits (n, styles) float32 of rows (n, ...), in the order of `styles`."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights by name."""


class StyleClassifier(torch.nn.Module):
    """Perceptron dim -> hidden -> styles on standardized features."""

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, dim: int, hidden: int, styles: tuple[str, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.styles = styles
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(dim, hidden),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(hidden, len(styles)),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, styles) of features (n, dim)."""
        logits: torch.Tensor = self.layers((features - self.mean) / self.deviation)
        return logits

    @torch.inference_mode()
    def logits(self, rows: npt.NDArray[Any]) -> Features:
        """Logits (n, styles) float32 of features (n, dim), in the order of `styles`."""
        return np.asarray(self(torch.from_numpy(np.asarray(rows, np.float32))).numpy())


Trainable = TypeVar("Trainable", bound=torch.nn.Module)


@dataclass(frozen=True)
class TrainedClassifier:
    """A network in eval mode and its accuracy on held-out rows, in total and by style."""

    network: Network
    held_out_accuracy: float
    held_out_by_style: dict[str, float]
    held_out_rows: int

    @classmethod
    def test(cls, network: Network, rows: npt.NDArray[Any], labels: Labels) -> "TrainedClassifier":
        """Measure a network on held-out rows (n, ...) with labels (n,), positions in its styles."""
        correct = np.argmax(network.logits(rows), axis=1) == labels
        by_style = {style: float(np.mean(correct[labels == i])) for i, style in enumerate(network.styles)}
        return cls(network, float(np.mean(correct)), by_style, len(labels))


def split_rows(labels: Labels, fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Sorted row numbers (training, held out), stratified: `fraction` of each label's rows is held out.

    Of each label, at least two rows are held out and two are for training: distances within a style need two. Raises
    UserError for a label with fewer than MIN_ROWS rows.
    """
    held_out: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < MIN_ROWS:
            raise UserError(
                f"style number {label} has {len(rows)} pictures; the classifier needs at least {MIN_ROWS}. "
                "Add pictures of it, or leave it out of [evaluate] styles."
            )
        count = min(max(2, round(len(rows) * fraction)), len(rows) - 2)
        held_out.extend(np.random.default_rng([seed, int(label)]).permutation(rows)[:count])
    sorted_rows = np.sort(np.array(held_out, np.int64))
    return np.setdiff1d(np.arange(len(labels)), sorted_rows), sorted_rows


def train_classifier(
    features: Features, labels: Labels, styles: tuple[str, ...], config: ClassifierConfig, seed: int
) -> TrainedClassifier:
    """Train the perceptron. features: (n, dim); labels: (n,) positions in `styles`."""
    rows, held_out = split_rows(labels, config.held_out_fraction, seed)

    def build() -> StyleClassifier:
        network = StyleClassifier(features.shape[1], config.hidden, styles, config.dropout)
        network.mean = torch.from_numpy(features[rows].mean(axis=0))
        network.deviation = torch.from_numpy(features[rows].std(axis=0) + np.float32(1e-6))
        return network

    network = fit(build, features[rows], labels[rows], config, seed)
    return TrainedClassifier.test(network, features[held_out], labels[held_out])


def fit(
    build: Callable[[], Trainable], rows: npt.NDArray[Any], labels: Labels, config: TrainingConfig, seed: int
) -> Trainable:
    """Build a network and train it with class-balanced cross entropy; returns it in eval mode.

    rows: (n, ...) inputs; labels: (n,) from 0, each present. The seed decides weights, order and dropout.
    """
    counts = np.bincount(labels)
    weight = torch.from_numpy((len(labels) / (len(counts) * counts)).astype(np.float32))
    x, y = torch.from_numpy(rows), torch.from_numpy(labels)

    def loss(network: Trainable, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(network(x[batch]), y[batch], weight)

    return minimize(build, loss, len(labels), config, seed)


def minimize(
    build: Callable[[], Trainable],
    loss: Callable[[Trainable, torch.Tensor], torch.Tensor],
    count: int,
    config: TrainingConfig,
    seed: int,
) -> Trainable:
    """Build a network and train it with AdamW on `count` rows; returns it in eval mode.

    loss: of a network and the numbers (batch,) of some rows. The seed decides weights, order and dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
        steps = config.epochs * -(-count // config.batch_size)
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(config.epochs):
            for batch in torch.randperm(count).split(config.batch_size):
                value = loss(network, batch)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def save_classifier(root: Root, name: str, trained: TrainedClassifier) -> list[FileRecord]:
    """Write the weights as `<name>.safetensors`, and styles and accuracies as `<name>.json`. Returns both files."""
    network = trained.network
    settings = {
        "styles": list(network.styles),
        "held_out_accuracy": trained.held_out_accuracy,
        "held_out_by_style": trained.held_out_by_style,
        "held_out_rows": trained.held_out_rows,
    }
    return [
        root.write_bytes(f"{name}.safetensors", save_tensors(network.state_dict())),
        root.write_json(f"{name}.json", settings),
    ]
