"""Scores of samples with confidence intervals by prompt (paper section 2.2, Fig. 4a and 4b).

Takes features of samples by mode and style and the trained judges, returns plain values for JSON. Pure functions:
`trainer.evaluation.evaluate` and `trainer.evaluation.paper` draw the samples and store the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.intervals import ENDS, Bootstrap, Estimate, Floats, Rows, interval, share, wilson_interval
from trainer.evaluation.metrics import (
    Features,
    KernelDistance,
    Manifold,
    clip_scores,
    fit_manifold,
    relative_improvement,
)
from trainer.evaluation.pixel_judge import Pixels
from trainer.evaluation.style_descriptor import StyleGallery
from trainer.evaluation.styles import NO_NEIGHBORS, RETRIEVAL, SUFFIX

NO_FLAGS = np.empty(0, np.bool_)
MAX_FAILURES = 0.025
"""A relative improvement has no upper bound if the baseline fails in a larger share of the resamples."""


@dataclass(frozen=True)
class SampleFeatures:
    """Features of the samples of one mode and style."""

    pictures: Features
    """(n, dim) CLIP features."""
    texts: Features
    """(n, dim) CLIP features of the prompts without the style."""
    prompts: tuple[str, ...]
    """The prompts without the style; intervals resample them."""
    pixels: Pixels
    """(n, EDGE, EDGE, 3)."""

    def first(self, count: int) -> "SampleFeatures":
        """Those of the first `count` samples."""
        return SampleFeatures(self.pictures[:count], self.texts[:count], self.prompts[:count], self.pixels[:count])


@dataclass(frozen=True)
class Reference:
    """CLIP features of the style databases and their manifold for precision and recall."""

    by_style: dict[str, Features]
    """(n, dim) unit rows of each style."""
    manifold: Manifold
    """Of all styles together."""
    neighbors: int
    """The nearest neighbor that sets the radius of manifolds."""
    held_out: dict[str, Features] | None = None
    """As `by_style`, of pictures that are in no database and so condition no sample; None without such pictures."""

    @classmethod
    def of(
        cls, by_style: dict[str, Features], neighbors: int, held_out: dict[str, Features] | None = None
    ) -> "Reference":
        """Raises ValueError unless there are more rows in all than `neighbors`."""
        return cls(by_style, fit_manifold(np.concatenate([*by_style.values()]), neighbors), neighbors, held_out)


@dataclass(frozen=True)
class Evaluator:
    """The judges of style, the reference of distances, and the bootstrap of intervals."""

    classifier: TrainedClassifier
    """The paper's judge on CLIP features, which also condition the samples."""
    pixel_classifier: TrainedClassifier | None
    """The judge on pixels, trained on pictures of its own; None without such pictures."""
    reference: Reference
    bootstrap: Bootstrap
    gallery: StyleGallery | None = None
    """The style descriptor, and the pictures that it was not trained on; None without pictures for judges."""

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles, in the order of the logits."""
        return self.classifier.network.styles


@dataclass(frozen=True)
class StyleScores:
    """Output of the judges for samples of one mode."""

    correct: npt.NDArray[np.bool_]
    """(n,) whether the sample is classified as its style."""
    correct_pixels: npt.NDArray[np.bool_]
    """The same for the judge on pixels; (0,) without one."""
    correct_nearest: npt.NDArray[np.bool_]
    """(n,) whether the nearest picture of the gallery has the style of the sample; (0,) without a gallery."""
    logits: Floats
    """(n,) logit of the requested style minus the mean of all: softmax ignores a common shift."""
    clip_scores: Floats
    """(n,) cosine of picture and prompt."""
    prompts: tuple[str, ...]


FeaturesByGroup = Mapping[tuple[str, str], SampleFeatures]
"""Features by (mode, style); all modes have the same prompts and seeds in the same order."""
Scores = dict[tuple[str, str], StyleScores]


def results(features: FeaturesByGroup, evaluator: Evaluator) -> dict[str, Any]:
    """A row for each mode over all styles, a row for each style, and the differences of retrieval to other modes.

    The judges may know more styles than those of the samples.
    """
    styles = list(dict.fromkeys(style for _, style in features))
    gallery = evaluator.gallery
    scores: Scores = {key: score(evaluator, key[1], group) for key, group in features.items()}
    modes = list(dict.fromkeys(mode for mode, _ in features))
    totals = {mode: pool([scores[mode, style] for style in styles]) for mode in modes}
    return {
        "chance": 1 / len(evaluator.styles),
        "num_styles": len(styles),
        "judges": {
            "clip": _judge(evaluator.classifier),
            "pixels": evaluator.pixel_classifier and _judge(evaluator.pixel_classifier),
            "descriptor": gallery and {"retrieval": gallery.retrieval(styles), "gallery_rows": len(gallery.labels)},
        },
        "modes": {
            mode: values(total, evaluator)
            | _distances({style: features[mode, style] for style in styles}, evaluator)
            | {"content_and_style": gallery and _content_and_style(features, mode, gallery, evaluator.bootstrap)}
            for mode, total in totals.items()
        },
        "effect": _effects(totals, "correct", evaluator),
        "effect_pixels": evaluator.pixel_classifier and _effects(totals, "correct_pixels", evaluator),
        "relative_improvement": _improvement(totals[RETRIEVAL], totals[SUFFIX], evaluator.bootstrap),
        "styles": [_style_row(style, modes, scores, evaluator) for style in styles],
    }


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored `results`; those of earlier versions have None for what they did not measure.

    `gallery_rows` is None if the gallery had the pictures that trained the descriptor, as in earlier versions.
    """
    descriptor = stored["judges"].get("descriptor")

    def values_of(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
        missing = dict.fromkeys(("accuracy_nearest", "content_and_style", *names))
        return {mode: missing | each for mode, each in row["modes"].items()}

    return {
        **stored,
        "judges": {**stored["judges"], "descriptor": descriptor and {"gallery_rows": None, **descriptor}},
        "modes": values_of(stored, "kernel_distance_held_out"),
        "styles": [{"retrieval": None, **row, "modes": values_of(row)} for row in stored["styles"]],
    }


def score(evaluator: Evaluator, style: str, features: SampleFeatures) -> StyleScores:
    """Judge samples that were requested in a style."""
    label = evaluator.styles.index(style)
    logits = evaluator.classifier.network.logits(features.pictures).astype(np.float64)
    judge = evaluator.pixel_classifier
    by_pixels = np.argmax(judge.network.logits(features.pixels), axis=1) == label if judge else NO_FLAGS
    gallery = evaluator.gallery
    nearest = gallery.has_style(gallery.descriptor.describe(features.pixels), style) if gallery else NO_FLAGS
    return StyleScores(
        correct=np.argmax(logits, axis=1) == label,
        correct_pixels=by_pixels,
        correct_nearest=nearest,
        logits=logits[:, label] - logits.mean(axis=1),
        clip_scores=clip_scores(features.pictures, features.texts),
        prompts=features.prompts,
    )


def pool(parts: Sequence[StyleScores]) -> StyleScores:
    """The scores of several styles, concatenated in order."""
    return StyleScores(
        correct=np.concatenate([part.correct for part in parts]),
        correct_pixels=np.concatenate([part.correct_pixels for part in parts]),
        correct_nearest=np.concatenate([part.correct_nearest for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        clip_scores=np.concatenate([part.clip_scores for part in parts]),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
    )


def values(scores: StyleScores, evaluator: Evaluator) -> dict[str, Any]:
    """Numbers of samples and prompts, accuracies by all judges, logit and CLIP score."""
    mean, prompts = evaluator.bootstrap.mean, scores.prompts
    return {
        "samples": len(scores.correct),
        "prompts": len(set(prompts)),
        "accuracy": share(scores.correct, prompts),
        "accuracy_pixels": evaluator.pixel_classifier and share(scores.correct_pixels, prompts),
        "accuracy_nearest": evaluator.gallery and share(scores.correct_nearest, prompts),
        "logit": mean(scores.logits, prompts),
        "clip_score": mean(scores.clip_scores, prompts),
    }


def _style_row(style: str, modes: Sequence[str], scores: Scores, evaluator: Evaluator) -> dict[str, Any]:
    pixels = evaluator.pixel_classifier
    return {
        "style": style,
        "held_out_accuracy": evaluator.classifier.held_out_by_style[style],
        "held_out_accuracy_pixels": pixels and pixels.held_out_by_style[style],
        "retrieval": evaluator.gallery and evaluator.gallery.retrieval([style]),
        "relative_improvement": _improvement(scores[RETRIEVAL, style], scores[SUFFIX, style], evaluator.bootstrap),
        "modes": {mode: values(scores[mode, style], evaluator) for mode in modes},
    }


def _judge(trained: TrainedClassifier) -> dict[str, Any]:
    accuracy, rows = trained.held_out_accuracy, trained.held_out_rows
    return {"accuracy": Estimate(accuracy, *wilson_interval(accuracy, rows)), "held_out_rows": rows}


def _effects(totals: Mapping[str, StyleScores], flags: str, evaluator: Evaluator) -> dict[str, Estimate]:
    """Accuracy of retrieval minus that of each other mode, for pairs with equal prompt and seed."""
    ours = totals[RETRIEVAL]
    return {
        mode: evaluator.bootstrap.difference(getattr(ours, flags), getattr(total, flags), ours.prompts)
        for mode, total in totals.items()
        if mode != RETRIEVAL
    }


def _distances(groups: Mapping[str, SampleFeatures], evaluator: Evaluator) -> dict[str, Estimate | None]:
    """Kernel distances to the style's own database, whose rows also condition samples, and to held-out pictures of the
    style, means over styles; precision and recall over all styles."""
    bootstrap, reference = evaluator.bootstrap, evaluator.reference
    pictures = np.concatenate([group.pictures for group in groups.values()])
    prompts = [prompt for group in groups.values() for prompt in group.prompts]

    def distance(real: dict[str, Features]) -> Estimate:
        pairs = [(group.pictures, real[style]) for style, group in groups.items()]
        value, resampled = _kernel_distance(pairs, bootstrap.weights(prompts))
        return interval(value, _known(resampled), prompts)

    covered = fit_manifold(pictures, reference.neighbors).contains(reference.manifold.centers)
    return {
        "kernel_distance": distance(reference.by_style),
        "kernel_distance_held_out": distance(reference.held_out) if reference.held_out else None,
        # Rows are resampled with fixed manifolds: duplicate rows would shrink a manifold.
        "precision": share(reference.manifold.contains(pictures), prompts),
        "recall": share(covered),
    }


def _kernel_distance(pairs: Sequence[tuple[Features, Features]], weights: Rows) -> tuple[float, Floats]:
    """Kernel distance of samples to reference rows, mean over styles, and that of each resample (draws,), maybe nan.

    pairs: samples and reference of each style, unit rows; weights: (draws, samples of all styles).
    """
    start, resampled, distances = 0, [], []
    for samples, reference in pairs:
        # Unit rows are scaled so that x y / dim in the kernel is their cosine.
        scale = np.float32(samples.shape[1] ** 0.5)
        kernel = KernelDistance.of(scale * samples, scale * reference)
        distances.append(kernel.value())
        resampled.append(kernel.resampled(weights[:, start : start + len(samples)]))
        start += len(samples)
    return float(np.mean(distances)), _mean_of_known(np.array(resampled))


def _content_and_style(features: FeaturesByGroup, mode: str, gallery: StyleGallery, bootstrap: Bootstrap) -> Estimate:
    """(1 + content distance) (1 + style distance), as in ArtFID (Wright and Ommer 2022); smaller is better.

    Content: 1 - CLIP similarity to the sample without neighbors of the same prompt and seed. Style: kernel distance of
    the style descriptors of samples and of the gallery's pictures of the style, mean over styles.
    """
    groups = {style: group for (of_mode, style), group in features.items() if of_mode == mode}
    plain = [features[NO_NEIGHBORS, style].pictures for style in groups]
    similarities = clip_scores(np.concatenate([group.pictures for group in groups.values()]), np.concatenate(plain))
    prompts = [prompt for group in groups.values() for prompt in group.prompts]
    weights = bootstrap.weights(prompts)
    content = 1 - np.concatenate([[similarities.mean()], weights @ similarities / weights.sum(axis=1)])
    describe = gallery.descriptor.describe
    pairs = [(describe(group.pixels), gallery.of_style(style)) for style, group in groups.items()]
    distance, resampled = _kernel_distance(pairs, weights)
    figures = (1 + content) * (1 + np.concatenate([[distance], resampled]))
    return interval(float(figures[0]), _known(figures[1:]), prompts)


def _mean_of_known(resampled: Floats) -> Floats:
    """Mean over styles of each resample, (draws,), without nan; nan without any. resampled: (styles, draws)."""
    known = np.isfinite(resampled)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, resampled, 0).sum(axis=0) / known.sum(axis=0))


def _known(resampled: Floats) -> Floats:
    return resampled[np.isfinite(resampled)]


def _improvement(ours: StyleScores, baseline: StyleScores, bootstrap: Bootstrap) -> dict[str, Any]:
    """Accuracy relative to a baseline with the same prompts (Fig. 4a); None if that never succeeds.

    The interval is None if the baseline fails in more than MAX_FAILURES of the resamples, and for a single prompt.
    """
    weights = bootstrap.weights(ours.prompts)
    ours_right, baseline_right = weights @ ours.correct, weights @ baseline.correct
    ends = None
    if len(set(ours.prompts)) > 1 and np.mean(baseline_right == 0) <= MAX_FAILURES:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.where(baseline_right > 0, ours_right / baseline_right - 1, np.inf)
        ends = [float(end) for end in np.quantile(ratios, ENDS, method="nearest")]
    value = relative_improvement(float(ours.correct.mean()), float(baseline.correct.mean()))
    return {"value": value, "interval": ends}
