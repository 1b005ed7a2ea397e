"""Style descriptor: vectors of pictures of which those of one style are nearest, also of styles without training.

Takes the pictures of the judge on pixels; reads and writes no files. A small convolutional network is trained as the
Contrastive Style Descriptors of Somepalli et al. (2024) are: pictures of one style attract each other, and so do two
random views of one picture; all others repel each other. A descriptor is judged, as theirs, by the style of the nearest
picture, and not by the value of a cosine, which differs from style to style. The pictures that others are compared with
are held out from the training: descriptors of pictures that trained the network are closer to each other than those of
new pictures of the style.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from trainer.evaluation.classifier import Labels, minimize
from trainer.evaluation.intervals import Estimate, share
from trainer.evaluation.metrics import Features
from trainer.evaluation.pixel_judge import BLOCK, JudgePictures, Pixels, as_input, make_layers
from trainer.evaluation.recipe import StyleDescriptorConfig

DIM = 64
TEMPERATURE = 0.1
VIEWS_WEIGHT = 0.2
"""Weight of the loss of two views of a picture; that of the styles has weight 1."""


class StyleDescriptor(torch.nn.Module):
    """The layers of the judge on pixels with DIM outputs, scaled to unit length."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layers = make_layers(dropout, DIM)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Unit vectors (n, DIM) of pixels (n, EDGE, EDGE, 3) uint8. In training, the pictures are changed at random."""
        return functional.normalize(self.layers(as_input(pixels, self.training)), dim=1)

    @torch.inference_mode()
    def describe(self, pixels: Pixels) -> Features:
        """Unit vectors (n, DIM) float32 of pixels (n, EDGE, EDGE, 3)."""
        return np.concatenate([self(block).numpy() for block in torch.from_numpy(pixels).split(BLOCK)])


@dataclass(frozen=True)
class StyleGallery:
    """A descriptor in eval mode and the real pictures that it compares others with: those that did not train it.

    There are at least two of each style. Of styles that the training did not show, they are the same share.
    """

    descriptor: StyleDescriptor
    styles: tuple[str, ...]
    features: Features
    """(n, DIM) unit vectors of the pictures."""
    labels: Labels
    """(n,) positions of their styles."""

    @classmethod
    def of(cls, descriptor: StyleDescriptor, pictures: JudgePictures) -> "StyleGallery":
        """The gallery of the pictures that are held out."""
        held_out = pictures.held_out
        features = descriptor.describe(pictures.pixels[held_out])
        return cls(descriptor, pictures.styles, features, pictures.labels[held_out])

    def retrieval(self, styles: Sequence[str]) -> Estimate:
        """mAP@1 of pictures of some styles: the share whose nearest other picture of the gallery has their style."""
        cosines = self.features @ self.features.T
        np.fill_diagonal(cosines, -np.inf)
        found = self.labels[np.argmax(cosines, axis=1)] == self.labels
        return share(found[np.isin(self.labels, [self.styles.index(style) for style in styles])])

    def of_style(self, style: str) -> Features:
        """The vectors (n, DIM) of a style's pictures."""
        return self.features[self.labels == self.styles.index(style)]

    def has_style(self, features: Features, style: str) -> npt.NDArray[np.bool_]:
        """(n,) whether the picture nearest to each of the vectors (n, DIM) has the style."""
        return nearest_labels(features, self.features, self.labels) == self.styles.index(style)


def nearest_labels(queries: Features, features: Features, labels: Labels) -> Labels:
    """(n,) the label of the row nearest to each query by cosine. queries: (n, dim), features: (m, dim) unit rows."""
    return labels[np.argmax(queries @ features.T, axis=1)]


def train_style_descriptor(
    pictures: JudgePictures, styles: Sequence[str], config: StyleDescriptorConfig, seed: int
) -> StyleGallery:
    """Train on the pictures for training of some styles. The gallery has held-out pictures of all styles.

    styles: at least two of those of the pictures.
    """
    known = np.isin(pictures.labels, [pictures.styles.index(style) for style in styles])
    rows = pictures.rows[known[pictures.rows]]
    pixels, labels = torch.from_numpy(pictures.pixels[rows]), torch.from_numpy(pictures.labels[rows])

    def loss(network: StyleDescriptor, batch: torch.Tensor) -> torch.Tensor:
        views = torch.cat([network(pixels[batch]), network(pixels[batch])])
        same_style, same_picture = (_equal(values.repeat(2)) for values in (labels[batch], batch))
        return contrastive_loss(views, same_style) + VIEWS_WEIGHT * contrastive_loss(views, same_picture)

    return StyleGallery.of(minimize(lambda: StyleDescriptor(config.dropout), loss, len(rows), config, seed), pictures)


def contrastive_loss(features: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """The supervised contrastive loss (Khosla et al. 2020, eq. 2).

    features: (n, dim) unit rows; positives: (n, n) bool, whether two rows attract each other. Each row needs one other
    that it attracts; the diagonal is ignored.
    """
    itself = torch.eye(len(features), dtype=torch.bool)
    similarities = (features @ features.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    log_shares = similarities.log_softmax(dim=1).masked_fill(~positives | itself, 0)
    return -(log_shares.sum(dim=1) / (positives & ~itself).sum(dim=1)).mean()


def _equal(values: torch.Tensor) -> torch.Tensor:
    """(n, n) whether two of the values (n,) are equal."""
    return values[:, None] == values[None]
