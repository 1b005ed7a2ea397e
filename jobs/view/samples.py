"""A random choice of a download's rows: stored pictures as thumbnails, and refused rows by reason.

Reads the tables and tars of the chosen shards of `download`, and the ids that `optout` hides, which are left out.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from jobs.reporting.thumbnails import stored_pictures, thumb
from retrieval.errors import UserError
from retrieval.index.hidden import hidden_ids
from retrieval.pictures.decode import PictureError, open_picture, upright_rgb
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, shard_file
from retrieval.storage.root import Root

THUMB_PX = 224
MAX_SHARDS = 4
"""Most shards of a split that a page shows."""
REMOTE_ROWS = 200
"""Pictures of an object store are chosen among the first rows of a shard: its tar is read up to the last picture."""
MAX_EXAMPLES = 4
"""Refused rows that a page shows of each reason."""
SCORES = [*schema.SCORES, "language"]
SIZES = ["width", "height", "original_width", "original_height"]
COLUMNS = [schema.IMAGE_ID, "url", "caption", *SCORES, "license", "reason", "message", *SIZES]


@dataclass(frozen=True)
class Row:
    """A row of a shard. fields: its COLUMNS; src: its thumbnail, a data URL, empty if it has no readable picture."""

    shard: str
    fields: dict[str, Any]
    src: str = ""

    @property
    def scores(self) -> dict[str, Any]:
        """The scores that the metadata have, by name."""
        return {name: self.fields[name] for name in SCORES if self.fields[name] is not None}


@dataclass(frozen=True)
class Sample:
    """Rows of a split. stored: with pictures; refused: examples by reason; reasons: counts of the shown shards.

    num_hidden: rows that are left out, because `optout` or `hide` removed them.
    """

    split: str
    shards: tuple[str, ...]
    num_shards: int
    num_stored: int
    num_hidden: int
    stored: tuple[Row, ...]
    reasons: dict[str, int]
    refused: dict[str, tuple[Row, ...]]


def shard_names(root: Root, manifest: Manifest | None) -> list[str]:
    """Names of the finished shards of `download`, such as `train/00000-00000`, sorted. manifest: None if unfinished.

    Raises UserError if there is none.
    """
    if manifest:
        return sorted(manifest.shard_names())
    records = root.list("download/records", ".json")
    names = [name.removeprefix("download/records/").removesuffix(".json") for name in records]
    if not names:
        raise UserError(f"{root.at('download')} has no finished shard. Run 'make download' first.")
    return names


def sample_split(root: Root, split: str, names: Sequence[str], num_pictures: int, seed: int) -> Sample:
    """A random choice of the rows of a split. names: of its shards; at most MAX_SHARDS of them are read."""
    rng = np.random.default_rng([seed, schema.SPLITS.index(split)])
    shards = sorted(rng.permutation(np.array(names, np.object_))[:MAX_SHARDS].tolist())
    hidden = pa.array(hidden_ids(root.child("index")))
    num_hidden = 0
    stored: list[Row] = []
    refused: dict[str, list[Row]] = {}
    reasons: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        rows = read_shard(root, shard)
        table = rows.filter(pc.invert(pc.is_in(rows[schema.IMAGE_ID], hidden)))
        num_hidden += len(rows) - len(table)
        reasons.update(table["reason"].to_pylist())
        count = (num_pictures - len(stored)) // (len(shards) - number)
        chosen = _choose(table, "", count, rng, None if root.is_local else REMOTE_ROWS)
        stored += with_pictures(root, shard, rows_of(shard, chosen), THUMB_PX)
        for reason in sorted(set(table["reason"].to_pylist()) - {""}):
            examples = refused.setdefault(reason, [])
            examples += rows_of(shard, _choose(table, reason, MAX_EXAMPLES - len(examples), rng))
    num_stored = reasons.pop("", 0)
    return Sample(
        split,
        tuple(shards),
        len(names),
        num_stored,
        num_hidden,
        tuple(stored),
        dict(reasons.most_common()),
        {reason: tuple(refused[reason]) for reason, _ in reasons.most_common()},
    )


def _choose(table: pa.Table, reason: str, count: int, rng: np.random.Generator, first: int | None = None) -> pa.Table:
    """At most `count` random rows with a reason, in the order of the table. first: choose among so many rows only."""
    rows = np.flatnonzero(pc.equal(table["reason"], reason).to_numpy())[:first]
    return table.take(pa.array(np.sort(rng.permutation(rows)[:count])))


def read_shard(root: Root, shard: str) -> pa.Table:
    """The COLUMNS of a shard of `download`."""
    return schema.read_table(root, shard_file(root, "download", shard, ".parquet"), schema.DOWNLOADED, COLUMNS)


def rows_of(shard: str, table: pa.Table) -> list[Row]:
    """The rows of a table of a shard, without pictures."""
    return [Row(shard, fields) for fields in table.to_pylist()]


def with_pictures(root: Root, shard: str, rows: Sequence[Row], edge: int) -> list[Row]:
    """The rows of a shard with their thumbnails; `edge`: their longer edge in pixels."""
    ids = [row.fields[schema.IMAGE_ID] for row in rows]
    tar = shard_file(root, "download", shard, ".tar")
    thumbs = {image_id: _thumb(data, edge) for image_id, data in stored_pictures(root, tar, ids)}
    return [replace(row, src=thumbs.get(row.fields[schema.IMAGE_ID], "")) for row in rows]


def _thumb(data: bytes, edge: int) -> str:
    """A stored picture as a data URL; empty if it cannot be decoded."""
    try:
        with open_picture(data) as image:
            image.draft("RGB", (2 * edge, 2 * edge))
            return thumb(Image.fromarray(upright_rgb(image)), edge)
    except PictureError:
        return ""
