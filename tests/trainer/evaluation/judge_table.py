"""A table of pictures for the judges on pixels: textures with random phases and colors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TEXTURES = ("checks", "dark_stripes", "diagonals", "dots", "waves")


def picture(style: str, rng: np.random.Generator) -> Image.Image:
    """A texture with a random phase and color, 80 x 96 pixels: only the texture differs."""
    rows, columns = np.mgrid[:96, :80] + rng.integers(0, 12)
    on = {
        "checks": (rows // 6) % 2 == (columns // 6) % 2,
        "dark_stripes": (rows // 6) % 2 == 0,
        "diagonals": ((rows + columns) // 5) % 2 == 0,
        "dots": (rows % 12 - 6) ** 2 + (columns % 12 - 6) ** 2 < 14,
        "waves": ((rows + 5 * np.sin(columns / 4)) // 8) % 2 == 0,
    }[style]
    return Image.fromarray((on[..., None] * rng.integers(60, 255, 3)).astype(np.uint8))


def write_judge_table(folder: Path, styles: Sequence[str], count: int) -> str:
    """Write `count` pictures, the styles in turn, and their table. Returns the path of the table."""
    rows: dict[str, list[str]] = {"path": [], "style": []}
    rng = np.random.default_rng(0)
    for number in range(count):
        style = styles[number % len(styles)]
        picture(style, rng).save(folder / f"{number}.png")
        rows["path"].append(f"{number}.png")
        rows["style"].append(style.replace("_", " "))
    rows["path"].append("another.png")  # of a style that nobody asks for: it is not even opened
    rows["style"].append("another style")
    pq.write_table(pa.table(rows), folder / "pictures.parquet")
    return str(folder / "pictures.parquet")
