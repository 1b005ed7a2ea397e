"""The thresholds of `filter` that are off by default: similarity, aesthetic score, language, shape, caption length.

Takes batches of metadata; returns the rows that each threshold drops. They hold for training and for the database. A
threshold reads its column only if it is on.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.recipe import FilterConfig
from retrieval.storage.arrow_columns import numbers, pixels, texts
from retrieval.storage.schema import Reason

Mask = npt.NDArray[np.bool_]

THRESHOLDS = {
    "similarity": ("min_similarity",),
    "aesthetic": ("min_aesthetic",),
    "language": ("languages",),
    "width": ("max_aspect_ratio",),
    "height": ("max_aspect_ratio",),
    "caption": ("min_caption_chars", "max_caption_chars"),
}
"""By column, the settings of FilterConfig that read it. One that is 0 or empty is off."""


def thresholds_on(column: str, config: FilterConfig) -> list[str]:
    """The settings that read a column and are on."""
    return [setting for setting in THRESHOLDS.get(column, ()) if getattr(config, setting)]


def threshold_columns(config: FilterConfig) -> list[str]:
    return [column for column in THRESHOLDS if thresholds_on(column, config)]


def dropped_rows(batch: pa.RecordBatch, config: FilterConfig) -> Iterator[tuple[Reason, Mask]]:
    """The rows that the thresholds drop, by reason. The first reason of a row counts.

    batch: has the columns `threshold_columns`.
    """
    if config.min_similarity:
        yield from _too_low(batch["similarity"], config.min_similarity, Reason.LOW_SIMILARITY)
    if config.min_aesthetic:
        yield from _too_low(batch["aesthetic"], config.min_aesthetic, Reason.LOW_AESTHETIC)
    if config.languages:
        languages = pc.utf8_lower(pc.utf8_trim_whitespace(texts(batch["language"])))
        listed = pc.is_in(languages, pa.array([language.lower() for language in config.languages]))
        yield Reason.OTHER_LANGUAGE, ~_mask(listed)
    if config.max_aspect_ratio:
        width, height = pixels(batch["width"]), pixels(batch["height"])
        shorter = np.minimum(width, height)
        yield Reason.BAD_SIZE, shorter < 1
        yield Reason.ASPECT_RATIO, np.maximum(width, height) > config.max_aspect_ratio * shorter
    if config.min_caption_chars or config.max_caption_chars:
        chars = pc.fill_null(pc.utf8_length(texts(batch["caption"], errors="ignore")), 0).to_numpy()
        too_long = (chars > config.max_caption_chars) & (config.max_caption_chars > 0)
        yield Reason.CAPTION_LENGTH, (chars < config.min_caption_chars) | too_long


def _too_low(column: pa.Array, least: float, reason: Reason) -> Iterator[tuple[Reason, Mask]]:
    """Rows without a score, and rows with a score below `least`."""
    scores = numbers(column)
    yield Reason.NO_SCORE, ~_mask(scores.is_valid())
    yield reason, _mask(pc.fill_null(pc.less(scores, least), False))


def _mask(column: pa.BooleanArray) -> Mask:
    return np.asarray(column.to_numpy(zero_copy_only=False), bool)
