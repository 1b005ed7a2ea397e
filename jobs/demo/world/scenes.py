"""Scenes of the demo: random ones, their captions and prompts, and their pictures.

A scene has a content (what it shows), a style (how it is painted) and a seed (position and texture). Contents and
styles are independent, so a sample's style can come from its neighbors alone. A tenth of the contents is held out.
"""

import hashlib
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
from PIL import Image

from jobs.demo.world.content import Content, Scene
from jobs.demo.world.sketch import MAX_ASPECT, plain_sketch
from jobs.demo.world.styles import PAINTERS, STYLES, UNKNOWN_PAINTERS
from jobs.demo.world.varied_styles import is_varied, paint_varied
from retrieval.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "moon", "flower")
COLORS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink")
BACKGROUNDS = ("hills", "sea", "desert", "city", "forest")
COUNTS = (1, 2, 3)
LAYOUTS = ("in a row", "stacked")
ARRANGEMENTS = tuple((count, layout) for count in COUNTS for layout in (LAYOUTS if count > 1 else ("",)))
"""Every pair of count and layout."""

HELD_OUT_SEED = 0
HELD_OUT_SHARE = 0.1
MIN_SIDE_PX = 64
# Smaller pictures are drawn at this size or more and then reduced, so that all sizes look alike.
DRAWN_SIDE_PX = 128

NUM_PHRASINGS = 3
"""Phrasings of the place of a content."""
_PAINTERS = PAINTERS | UNKNOWN_PAINTERS
_ARTICLES = {1: "a", 2: "two", 3: "three"}
_PLACES = {
    "hills": ("over the hills", "above green hills", "with hills behind"),
    "sea": ("over the sea", "above the sea", "with the sea behind"),
    "desert": ("over the desert", "above the desert", "with a desert behind"),
    "city": ("over the city", "above the city", "with a city behind"),
    "forest": ("over the forest", "above the forest", "with a forest behind"),
}


def all_contents() -> list[Content]:
    """Every content, sorted."""
    combinations = product(SHAPES, COLORS, BACKGROUNDS, ARRANGEMENTS)
    return sorted(Content(s, c, b, count, layout) for s, c, b, (count, layout) in combinations)


def is_held_out(content: Content, seed: int = HELD_OUT_SEED) -> bool:
    """True for a tenth of the contents, by hash: none is in training set, database or style folders."""
    digest = hashlib.blake2b(repr((seed, content)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def random_scene(rng: np.random.Generator, held_out: bool = False, style: str | None = None) -> Scene:
    """A scene with a random content, held out or not, in this style or a random one."""
    while True:
        count = int(rng.choice(COUNTS))
        content = Content(
            shape=str(rng.choice(SHAPES)),
            color=str(rng.choice(COLORS)),
            background=str(rng.choice(BACKGROUNDS)),
            count=count,
            layout=str(rng.choice(LAYOUTS)) if count > 1 else "",
        )
        if is_held_out(content) == held_out:
            return Scene(content, style or str(rng.choice(STYLES)), int(rng.integers(2**31)))


def draw(scene: Scene, width: int, height: int) -> npt.NDArray[np.uint8]:
    """The picture, (height, width, 3) uint8 sRGB.

    The figure lies in the central square and textures scale with the shorter side, so a scene looks the same
    at every size. Raises UserError below 64 px or above an aspect ratio of 4.
    """
    _check_size(width, height)
    factor = max(1, -(-DRAWN_SIDE_PX // min(width, height)))
    sketch = plain_sketch(scene.content, scene.seed, width * factor, height * factor)
    picture = paint_varied(scene.style, sketch) if is_varied(scene.style) else _PAINTERS[scene.style](sketch)
    picture *= np.float32(255)
    picture += np.float32(0.5)
    pixels = np.clip(picture, 0, 255, out=picture).astype(np.uint8)
    if factor == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).reduce(factor))


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE_PX or max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"draw: cannot draw a picture of {width} x {height} px. Wanted at least {MIN_SIDE_PX} px on each "
            f"side and an aspect ratio of at most {MAX_ASPECT}. Choose another size."
        )


def _subject(content: Content) -> str:
    plural = "s" if content.count > 1 else ""
    article = "an" if (content.count, content.color) == (1, "orange") else _ARTICLES[content.count]
    return f"{article} {content.color} {content.shape}{plural}"


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random sentence about the scene. 40 % omit style, background or layout. All omit a style without a name."""
    content = scene.content
    omitted = str(rng.choice(("style", "background", "layout"))) if rng.random() < 0.4 else ""
    if is_varied(scene.style):
        omitted = "style"
    layout = "" if omitted == "layout" else content.layout
    place = "" if omitted == "background" else str(rng.choice(_PLACES[content.background]))
    description = _join(_subject(content), layout, place)
    if omitted == "style":
        return _join(str(rng.choice(("", "a picture of", "an image of"))), description)
    templates = ("{0} in the style of {1}", "{1} of {0}", "{0}, {1}", "{1}: {0}")
    weights = (0.4, 0.2, 0.2, 0.2)
    return str(rng.choice(templates, p=weights)).format(description, scene.style)


def full_caption(scene: Scene) -> str:
    """A sentence with count, color, shape, layout, background and style."""
    return suffix_prompt(scene.content, scene.style)


def prompt(content: Content, phrasing: int = 0) -> str:
    """A sentence with the content and without the style. phrasing: of the place, 0 to 2."""
    return _join(_subject(content), content.layout, _PLACES[content.background][phrasing])


@cache
def contents_by_prompt() -> dict[str, Content]:
    """The content of every prompt."""
    return {prompt(content, phrasing): content for content in all_contents() for phrasing in range(NUM_PHRASINGS)}


def held_out_prompts(count: int) -> list[str]:
    """`count` different prompts with held-out contents, sorted.

    A content repeats, with its place in other words, only after all contents are used. Raises UserError if there are
    not so many prompts.
    """
    contents = [content for content in all_contents() if is_held_out(content)]
    rng = np.random.default_rng([HELD_OUT_SEED, len(contents)])
    prompts = [
        prompt(contents[i], phrasing) for phrasing in range(NUM_PHRASINGS) for i in rng.permutation(len(contents))
    ]
    if count > len(prompts):
        raise UserError(f"held-out prompts: {len(prompts)} exist, {count} were asked for. Ask for fewer.")
    return sorted(prompts[:count])


def suffix_prompt(content: Content, style: str) -> str:
    """The prompt, followed by the style in words."""
    return f"{prompt(content)} in the style of {style}"
