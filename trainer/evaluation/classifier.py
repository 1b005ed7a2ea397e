"""The judge of styles: a two-layer perceptron on CLIP image features (paper section 2.2, appendix C).

Trained on the features of the style databases' own pictures, with some rows held out to say how far it
can be trusted. Reads and writes `<folder>/classifier.safetensors` and `classifier.json`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from retrieval.errors import UserError
from retrieval.storage.root import FileRecord, Root
from trainer.sampling.recipe import ClassifierConfig

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
MIN_ROWS = 4


class StyleClassifier(torch.nn.Module):
    """dim -> hidden -> styles, on features scaled by the training rows' mean and deviation."""

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
    """A classifier in eval mode with the accuracy on rows that it never saw, in all and by style."""

    classifier: StyleClassifier
    held_out_accuracy: float
    held_out_by_style: dict[str, float]
    held_out_rows: int


def split_rows(labels: Labels, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Row numbers (training, held out), sorted, with the fraction taken from every label.

    Each side has at least one row of each label. Raises UserError for a label with fewer than 4 rows.
    """
    held: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < MIN_ROWS:
            raise UserError(
                f"style number {label} has {len(rows)} pictures; at least {MIN_ROWS} are needed to judge it. "
                "Add pictures to its database or leave it out of [evaluate] styles."
            )
        count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
        held.extend(np.random.default_rng([seed, int(label)]).permutation(rows)[:count])
    held_rows = np.sort(np.array(held, np.int64))
    return np.setdiff1d(np.arange(len(labels)), held_rows), held_rows


def train_classifier(
    features: Features, labels: Labels, styles: tuple[str, ...], config: ClassifierConfig, seed: int
) -> TrainedClassifier:
    """Fit the perceptron with AdamW and class-balanced cross entropy; deterministic from the seed.

    features: (n, dim); labels: (n,) positions in `styles`, each of which occurs.
    """
    rows, held = split_rows(labels, config.held_out_fraction, seed)
    classifier = _fit(features[rows], labels[rows], styles, config, seed)
    right = np.argmax(classifier.logits(features[held]), axis=1) == labels[held]
    by_style = {style: float(np.mean(right[labels[held] == i])) for i, style in enumerate(styles)}
    return TrainedClassifier(classifier, float(np.mean(right)), by_style, len(held))


def _fit(
    features: Features, labels: Labels, styles: tuple[str, ...], config: ClassifierConfig, seed: int
) -> StyleClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = StyleClassifier(features.shape[1], config.hidden, styles, config.dropout)
        _scale(classifier, features)
        counts = np.bincount(labels, minlength=len(styles))
        weight = torch.from_numpy((len(labels) / (len(styles) * counts)).astype(np.float32))
        steps = config.epochs * -(-len(labels) // config.batch_size)
        optimizer = torch.optim.AdamW(
            classifier.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        x, y = torch.from_numpy(features), torch.from_numpy(labels)
        for _ in range(config.epochs):
            for batch in torch.randperm(len(labels)).split(config.batch_size):
                loss = torch.nn.functional.cross_entropy(classifier(x[batch]), y[batch], weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return classifier.eval()


def _scale(classifier: StyleClassifier, features: Features) -> None:
    classifier.mean = torch.from_numpy(features.mean(axis=0))
    classifier.deviation = torch.from_numpy(features.std(axis=0) + np.float32(1e-6))


def save_classifier(root: Root, folder: str, trained: TrainedClassifier) -> list[FileRecord]:
    """Write the weights as safetensors and the rest as JSON. Returns both files."""
    classifier = trained.classifier
    facts = {
        "styles": list(classifier.styles),
        "dim": classifier.mean.shape[0],
        "hidden": classifier.layers[0].out_features,
        "held_out_accuracy": trained.held_out_accuracy,
        "held_out_by_style": trained.held_out_by_style,
        "held_out_rows": trained.held_out_rows,
    }
    return [
        root.write_bytes(f"{folder}/classifier.safetensors", save_tensors(classifier.state_dict())),
        root.write_json(f"{folder}/classifier.json", facts),
    ]


def load_classifier(root: Root, folder: str) -> TrainedClassifier:
    """Read what `save_classifier` wrote. Raises UserError where it is missing."""
    facts = root.read_json(f"{folder}/classifier.json")
    classifier = StyleClassifier(facts["dim"], facts["hidden"], tuple(facts["styles"]))
    with root.open(f"{folder}/classifier.safetensors") as file:
        classifier.load_state_dict(load_tensors(file.read()))
    return TrainedClassifier(
        classifier.eval(), facts["held_out_accuracy"], facts["held_out_by_style"], facts["held_out_rows"]
    )
