"""Rows of the demo that repeat other rows: duplicates, other captions, and copies of training pictures.

The copies have a small size in the metadata, so the filter sends them to the database. There they would be the best
neighbors of their originals; only content and embedding reveal them.
"""

from dataclasses import replace

import numpy as np

from jobs.demo.world.bad_rows import num_rows
from jobs.demo.world.metadata import Row, Site
from jobs.demo.world.pictures import Copy
from jobs.demo.world.scenes import full_caption

RELATED_STREAM = 3
DUPLICATE_PER_MILLE = 8
COPY_PER_MILLE = 12
NEAR_COPY_PER_MILLE = 16


def related_rows(site: Site, train: list[Row], database: list[Row]) -> list[Row]:
    """Duplicates, rows with another caption, and copies of training pictures with a small stated size."""
    rng = np.random.default_rng([site.seed, RELATED_STREAM])
    ordinary = train + database

    def sample(rows: list[Row], per_mille: int) -> list[Row]:
        number = min(len(rows), num_rows(per_mille, len(ordinary)))
        return [rows[i] for i in rng.choice(len(rows), number, replace=False)]

    duplicates = [_duplicate(row) for row in sample(ordinary, DUPLICATE_PER_MILLE)]
    recaptioned = [_recaptioned(row) for row in sample(ordinary, DUPLICATE_PER_MILLE)]
    copies = [_copy(site, row) for row in sample(train, COPY_PER_MILLE)]
    near_copies = [_near_copy(site, row, rng) for row in sample(train, NEAR_COPY_PER_MILLE)]
    return duplicates + recaptioned + copies + near_copies


def _duplicate(row: Row) -> Row:
    return replace(row, kind="duplicate_row", file=None)


def _recaptioned(row: Row) -> Row:
    assert row.scene is not None
    return replace(row, kind="other_caption", caption=f"{full_caption(row.scene)}, free download", file=None)


def _copy(site: Site, row: Row) -> Row:
    """The same bytes under another URL, with a small stated size so that the row goes to the database."""
    assert row.file is not None
    name = row.file.path.removeprefix("images/")
    file = Copy(f"images/copy-{name}", row.file.path)
    return replace(row, kind="copy", url=f"{site.base}/{file.path}", width=256, height=256, file=file)


def _near_copy(site: Site, row: Row, rng: np.random.Generator) -> Row:
    """The picture under another URL, reduced and encoded again."""
    assert row.file is not None
    assert row.size is not None
    edge = int(rng.integers(224, 281))
    file = Copy(f"images/small-{row.scene_uid:06d}.jpg", row.file.path, edge, int(rng.integers(60, 86)))
    factor = edge / min(row.size)
    size = (round(row.size[0] * factor), round(row.size[1] * factor))
    url = f"{site.base}/{file.path}"
    return replace(row, kind="near_copy", url=url, width=size[0], height=size[1], size=size, file=file)
