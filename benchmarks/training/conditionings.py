"""The requests of `make bench-curve` with other conditionings: whether text, neighbors or the network loses a content.

Real pictures of the requested content and style are drawn anew, in no training set or database; their CLIP vectors take
the place of prompt and neighbors.
"""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO

from PIL import Image

from jobs.demo.judge.network import EDGE
from jobs.demo.world.content import Scene
from jobs.demo.world.scenes import draw
from retrieval.clip.encoder import Encoder
from trainer.sampling.request import ImageQuery, Request

NUM_PICTURES = 8
GUIDANCES = (1, 4)
CONDITIONINGS = {
    "text": "the prompt alone",
    "picture": "a real picture of the content and style, without the prompt",
    "pictures": f"{NUM_PICTURES} real pictures of the content and style, without the prompt",
    **{f"guidance_{scale}": f"the prompt and its neighbors, guidance {scale}" for scale in GUIDANCES},
}
"""The conditionings in words, by name."""
WITHOUT_STYLE = ("text",)
"""Conditionings that ask for no style."""


def other_conditionings(
    scenes: Sequence[Scene], requests: Sequence[Request], encoder: Encoder
) -> dict[str, tuple[Request, ...]]:
    """The requests with each of CONDITIONINGS. scenes: what each of them asks for."""
    pictures = [_pictures(scene, request.seed, encoder) for scene, request in zip(scenes, requests, strict=True)]
    alone = [replace(request, mode="text") for request in requests]
    conditioned = {"text": tuple(alone)}
    for name, count in (("picture", 1), ("pictures", NUM_PICTURES)):
        pairs = zip(alone, pictures, strict=True)
        conditioned[name] = tuple(replace(request, prompt="", images=row[:count]) for request, row in pairs)
    for scale in GUIDANCES:
        conditioned[f"guidance_{scale}"] = tuple(replace(request, guidance=float(scale)) for request in requests)
    return conditioned


def _pictures(scene: Scene, seed: int, encoder: Encoder) -> tuple[ImageQuery, ...]:
    """NUM_PICTURES pictures of a scene with other positions and textures, and their CLIP vectors."""
    images = [Image.fromarray(draw(replace(scene, seed=seed + number), EDGE, EDGE)) for number in range(NUM_PICTURES)]
    queries = []
    for number, (image, vector) in enumerate(zip(images, encoder.encode_images(images, unit=False), strict=True)):
        file = BytesIO()
        image.save(file, "PNG")
        queries.append(ImageQuery.from_file(f"{number}.png", file.getvalue(), vector))
    return tuple(queries)
