"""The attributes of a scene as class numbers, and shares of correct predictions by attribute."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from jobs.demo.world.content import Scene
from jobs.demo.world.scenes import BACKGROUNDS, COLORS, COUNTS, LAYOUTS, SHAPES
from jobs.demo.world.styles import STYLES
from jobs.demo.world.varied_styles import is_varied, varied_number
from trainer.evaluation.intervals import Estimate, share

CLASSES: dict[str, tuple[str | int, ...]] = {
    "shape": SHAPES,
    "count": COUNTS,
    "color": COLORS,
    "background": BACKGROUNDS,
    "layout": ("", *LAYOUTS),
    "style": STYLES,
}
"""The values of each attribute; layout is "" for a single figure."""
Labels = dict[str, npt.NDArray[np.int64]]
"""Class numbers of n scenes by attribute, (n,) each."""
Flags = Mapping[str, npt.NDArray[np.bool_]]
"""Whether each of n pictures is correct, by attribute, (n,) each."""


def labels_of(scenes: Sequence[Scene]) -> Labels:
    """The true class numbers of scenes."""
    values = [{**vars(scene.content), "style": scene.style} for scene in scenes]
    return {name: np.array([_class_number(name, row[name]) for row in values]) for name in CLASSES}


def _class_number(name: str, value: str | int) -> int:
    """Styles without a name follow those that have one: no prediction is equal to them."""
    if name == "style" and is_varied(str(value)):
        return len(STYLES) + varied_number(str(value))
    return CLASSES[name].index(value)


def equal(predicted: Labels, wanted: Labels) -> Flags:
    """Where two labels agree."""
    return {name: predicted[name] == wanted[name] for name in CLASSES}


def shares(flags: Flags, wanted: Labels) -> dict[str, Estimate]:
    """Share of correct pictures by attribute with its 95 % interval; layout: of the pictures with several figures.

    Pictures of the same wanted content are one cluster, in any style and with any words of the prompt.
    """
    several = wanted["layout"] > 0
    contents = np.stack([numbers for name, numbers in wanted.items() if name != "style"], axis=1)
    names = np.unique(contents, axis=0, return_inverse=True)[1].reshape(-1)
    result = {}
    for name, correct in flags.items():
        rows = several if name == "layout" else np.ones_like(several)
        if rows.any():
            result[name] = share(correct[rows], names[rows].tolist())
    return result
