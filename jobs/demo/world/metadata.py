"""The demo's metadata in the format of LAION-2B-en, and a table of the true values of every row.

Writes `metadata/part-00000.parquet ...` with the columns of laion2B-en-joined plus LICENSE, and `truth.parquet`, which
only the report and the tests read. Ordinary rows are made here, unusual rows in jobs.demo.world.bad_rows.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.demo.world.content import Scene
from jobs.demo.world.pictures import FORMATS, Copy, Drawing
from jobs.demo.world.scenes import caption, random_scene
from jobs.demo.world.varied_styles import NUM_VARIED_STYLES, varied_style
from retrieval.storage.root import Root

ROWS_STREAM = 1
VARIED_STREAM = 9

METADATA_SCHEMA = pa.schema(
    [
        ("URL", pa.string()),
        ("TEXT", pa.string()),
        ("WIDTH", pa.int32()),
        ("HEIGHT", pa.int32()),
        ("similarity", pa.float64()),
        ("hash", pa.int64()),
        ("punsafe", pa.float32()),
        ("pwatermark", pa.float32()),
        ("LICENSE", pa.string()),
    ]
)
CONTENT_FIELDS = ("shape", "color", "background", "count", "layout")
CONTENT_COLUMNS = [(name, pa.int64() if name == "count" else pa.string()) for name in CONTENT_FIELDS]
TRUTH_SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("scene_uid", pa.int64()),
        ("kind", pa.string()),
        ("style", pa.string()),
        *CONTENT_COLUMNS,
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Site:
    """Where the pictures are, and what decides them."""

    base: str
    """Address of the server, such as http://127.0.0.1:28123."""
    seed: int
    """Seed of all rows."""
    varied_share: float = 0.0
    """Share of the ordinary pictures in styles without a name."""


@dataclass(frozen=True)
class Row:
    """One metadata row, as stated in the metadata, and the true values.

    scene_uid, scene, size (width, height in px): of the picture at the URL, None if there is none.
    file: the picture file that this row adds to the world; None if there is none or another row adds it.
    """

    url: str | None
    caption: str | None
    width: int | None
    height: int | None
    similarity: float | None
    punsafe: float | None
    pwatermark: float | None
    license: str
    kind: str
    scene_uid: int | None
    scene: Scene | None
    size: tuple[int, int] | None
    file: Drawing | Copy | None


def ordinary_row(site: Site, uid: int, large: bool, file_format: str = "") -> Row:
    """A row with correct metadata that passes every threshold.

    large: shorter edge of 768 px or more (a training picture), else both edges in 224..320.
    file_format: a key of pictures.FORMATS; "" chooses a common one at random.
    """
    rng = np.random.default_rng([site.seed, ROWS_STREAM, uid])
    scene = random_scene(rng)
    styles = np.random.default_rng([site.seed, VARIED_STREAM, uid])
    if styles.random() < site.varied_share:
        scene = replace(scene, style=varied_style(int(styles.integers(NUM_VARIED_STYLES))))
    size = _large_size(rng) if large else _small_size(rng)
    file_format = file_format or _usual_format(rng, large)
    name = f"{uid:06d}.{FORMATS[file_format][0]}"
    query = f"?v={rng.integers(1_000_000)}" if rng.random() < 0.15 else ""
    return Row(
        url=f"{site.base}/images/{name}{query}",
        caption=caption(scene, rng),
        width=size[0],
        height=size[1],
        similarity=float(rng.uniform(0.28, 0.45)),
        punsafe=float(0.4 * rng.beta(1, 8)),
        pwatermark=float(0.7 * rng.beta(1, 4)),
        license=str(rng.choice(("?", "CC BY 4.0", "CC BY-SA 4.0"), p=(0.9, 0.05, 0.05))),
        kind="image",
        scene_uid=uid,
        scene=scene,
        size=size,
        file=Drawing(f"images/{name}", scene, *size, file_format, int(rng.integers(85, 93))),
    )


def _large_size(rng: np.random.Generator) -> tuple[int, int]:
    short = 768 + int(53 * rng.random() ** 2)
    long = short + int((901 - short) * rng.random() ** 2)
    return (short, long) if rng.random() < 0.4 else (long, short)


def _small_size(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(224, 321)), int(rng.integers(224, 321))


def _usual_format(rng: np.random.Generator, large: bool) -> str:
    # no large PNG: with a textured style it takes a megabyte
    shares = (0.95, 0.05, 0) if large else (0.86, 0.08, 0.06)
    return str(rng.choice(("jpg", "webp", "png"), p=shares))


def write_tables(rows: list[Row], num_files: int, root: Root) -> None:
    """Write the metadata files and truth.parquet, with the rows in this order."""
    for number, part in enumerate(np.array_split(np.arange(len(rows)), num_files)):
        table = metadata_table([rows[i] for i in part])
        with root.writing(f"metadata/part-{number:05d}.parquet") as pending:
            pq.write_table(table, pending.path)
    with root.writing("truth.parquet") as pending:
        pq.write_table(truth_table(rows), pending.path)


def metadata_table(rows: list[Row]) -> pa.Table:
    """The rows with the columns of the LAION release."""
    records = [
        {
            "URL": row.url,
            "TEXT": row.caption,
            "WIDTH": row.width,
            "HEIGHT": row.height,
            "similarity": row.similarity,
            "hash": _url_text_key(row),
            "punsafe": row.punsafe,
            "pwatermark": row.pwatermark,
            "LICENSE": row.license,
        }
        for row in rows
    ]
    return pa.Table.from_pylist(records, METADATA_SCHEMA)


def _url_text_key(row: Row) -> int:
    """A hash of URL and text, as in the release. It does not depend on the bytes of the picture."""
    text = (row.url or "") + (row.caption or "")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def truth_table(rows: list[Row]) -> pa.Table:
    """The true values of every row: its kind, and scene and size of the picture at its URL.

    Duplicate rows have the same URL and the same scene, so any of them can be used to look up a URL.
    """
    return pa.Table.from_pylist([_truth(row) for row in rows], TRUTH_SCHEMA)


def _truth(row: Row) -> dict[str, object]:
    truth: dict[str, object] = {"url": row.url, "scene_uid": row.scene_uid, "kind": row.kind}
    if row.size is not None:
        truth |= {"width": row.size[0], "height": row.size[1]}
    return truth | (scene_fields(row.scene) if row.scene is not None else {})


def scene_fields(scene: Scene) -> dict[str, object]:
    """The columns that describe a scene."""
    return {"style": scene.style} | {name: getattr(scene.content, name) for name in CONTENT_FIELDS}
