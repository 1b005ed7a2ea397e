"""Style classifier: a two-layer perceptron on CLIP image features (paper section 2.2, appendix C).

Trained on the features of the style databases; some rows are held out to measure its accuracy. Writes
`<folder>/classifier.safetensors` and `classifier.json`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save as save_tensors

from retrieval.errors import UserError
from retrieval.storage.root import FileRecord, Root
from trainer.evaluation.metrics import Features
from trainer.evaluation.recipe import ClassifierConfig

Labels = npt.NDArray[np.int64]
MIN_ROWS = 4


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
    def logits(self, features: Features) -> Features:
        """Logits (n, styles) float32 of features (n, dim), in the order of `styles`."""
        return np.asarray(self(torch.from_numpy(np.asarray(features, np.float32))).numpy())


@dataclass(frozen=True)
class TrainedClassifier:
    """A network in eval mode and its accuracy on held-out rows, in total and by style."""

    network: StyleClassifier
    held_out_accuracy: float
    held_out_by_style: dict[str, float]
    held_out_rows: int


def split_rows(labels: Labels, fraction: float, seed: int) -> tuple[Labels, Labels]:
    """Sorted row numbers (training, held out), stratified: `fraction` of each label's rows is held out.

    Both have at least one row of each label. Raises UserError for a label with fewer than MIN_ROWS rows.
    """
    held_out: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < MIN_ROWS:
            raise UserError(
                f"style number {label} has {len(rows)} pictures; the classifier needs at least {MIN_ROWS}. "
                "Add pictures to its database or leave it out of [evaluate] styles."
            )
        count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
        held_out.extend(np.random.default_rng([seed, int(label)]).permutation(rows)[:count])
    sorted_rows = np.sort(np.array(held_out, np.int64))
    return np.setdiff1d(np.arange(len(labels)), sorted_rows), sorted_rows


def train_classifier(
    features: Features, labels: Labels, styles: tuple[str, ...], config: ClassifierConfig, seed: int
) -> TrainedClassifier:
    """Train with AdamW and class-balanced cross entropy. features: (n, dim); labels: (n,) positions in `styles`."""
    rows, held_out = split_rows(labels, config.held_out_fraction, seed)
    network = _fit(features[rows], labels[rows], styles, config, seed)
    correct = np.argmax(network.logits(features[held_out]), axis=1) == labels[held_out]
    by_style = {style: float(np.mean(correct[labels[held_out] == i])) for i, style in enumerate(styles)}
    return TrainedClassifier(network, float(np.mean(correct)), by_style, len(held_out))


def _fit(
    features: Features, labels: Labels, styles: tuple[str, ...], config: ClassifierConfig, seed: int
) -> StyleClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = StyleClassifier(features.shape[1], config.hidden, styles, config.dropout)
        network.mean = torch.from_numpy(features.mean(axis=0))
        network.deviation = torch.from_numpy(features.std(axis=0) + np.float32(1e-6))
        counts = np.bincount(labels, minlength=len(styles))
        weight = torch.from_numpy((len(labels) / (len(styles) * counts)).astype(np.float32))
        steps = config.epochs * -(-len(labels) // config.batch_size)
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        x, y = torch.from_numpy(features), torch.from_numpy(labels)
        for _ in range(config.epochs):
            for batch in torch.randperm(len(labels)).split(config.batch_size):
                loss = torch.nn.functional.cross_entropy(network(x[batch]), y[batch], weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def save_classifier(root: Root, folder: str, trained: TrainedClassifier) -> list[FileRecord]:
    """Write the weights as safetensors, and styles, sizes and accuracies as JSON. Returns both files."""
    network = trained.network
    settings = {
        "styles": list(network.styles),
        "dim": network.mean.shape[0],
        "hidden": network.layers[0].out_features,
        "held_out_accuracy": trained.held_out_accuracy,
        "held_out_by_style": trained.held_out_by_style,
        "held_out_rows": trained.held_out_rows,
    }
    return [
        root.write_bytes(f"{folder}/classifier.safetensors", save_tensors(network.state_dict())),
        root.write_json(f"{folder}/classifier.json", settings),
    ]
