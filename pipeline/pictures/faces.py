"""Blurs faces where the metadata has boxes, before a picture is stored.

A box is left, top, right and bottom as shares of the picture's edges, as in DataComp. The deviation of the blur and the
width of its soft edge are a tenth of the box's diagonal, so a face keeps no detail at any size.
"""

import json
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from retrieval.pictures.decode import PictureError, Pixels
from retrieval.storage.schema import Reason

MAX_BOXES = 1_000
DEVIATION = 0.1
"""Of the blur, as a share of the diagonal of a box."""
Box = tuple[float, float, float, float]


def parse_boxes(text: str | None) -> list[Box]:
    """The boxes in `face_boxes` of a row, cut at the edges of the picture. Raises PictureError for other content."""
    try:
        boxes = json.loads(text or "[]")
        if len(boxes) > MAX_BOXES:
            raise ValueError
        return [_checked(*box) for box in boxes]
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        message = f"its face boxes are {(text or '')[:100]!r}: wanted [left, top, right, bottom] as shares of the edges"
        raise PictureError(Reason.BAD_FACE_BOXES, message) from error


def _checked(left: float, top: float, right: float, bottom: float) -> Box:
    """A box cut at the edges. Detectors give boxes that leave the picture a little; pixels would leave it by far."""
    sides = (float(left), float(top), float(right), float(bottom))
    if not all(-1 <= side <= 2 for side in sides):
        raise ValueError(sides)
    cut = (max(0.0, sides[0]), max(0.0, sides[1]), min(1.0, sides[2]), min(1.0, sides[3]))
    if cut[0] >= cut[2] or cut[1] >= cut[3]:
        raise ValueError(sides)
    return cut


def upright_boxes(boxes: Sequence[Box], turn: int) -> list[Box]:
    """The boxes, and if the picture has an EXIF orientation also those places in the picture as it is stored.

    Some detectors apply the orientation, others do not. Metadata does not state which.
    """
    if turn == 1:
        return [*boxes]
    turned = []
    for left, top, right, bottom in boxes:
        across = (1 - right, 1 - left) if turn in (2, 3, 7, 8) else (left, right)
        down = (1 - bottom, 1 - top) if turn in (3, 4, 6, 7) else (top, bottom)
        (x, x_end), (y, y_end) = (down, across) if turn >= 5 else (across, down)
        turned.append((x, y, x_end, y_end))
    return [*boxes, *turned]


def blur(pixels: Pixels, box: Box) -> None:
    """Blur a box of RGB pixels in place. Pixels farther than 0.2 diagonals of the box from it stay."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    deviation = max(1.0, DEVIATION * math.hypot(right - left, bottom - top))
    x, y = max(0, math.floor(left - 2 * deviation)), max(0, math.floor(top - 2 * deviation))
    x_end, y_end = min(width, math.ceil(right + 2 * deviation)), min(height, math.ceil(bottom + 2 * deviation))
    region = Image.fromarray(pixels[y:y_end, x:x_end])
    mask = Image.new("L", region.size)
    inner = (left - deviation - x, top - deviation - y, right + deviation - x, bottom + deviation - y)
    ImageDraw.Draw(mask).rectangle(inner, fill=255)
    # The mask is full inside the box: its edge is three deviations of this blur away.
    mask = mask.filter(ImageFilter.GaussianBlur(deviation / 3))
    soft = region.filter(ImageFilter.GaussianBlur(deviation))
    pixels[y:y_end, x:x_end] = np.asarray(Image.composite(soft, region, mask))
