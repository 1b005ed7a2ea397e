"""database: a style database from pictures at hand, one of all and, where asked, one of each style.

Reads what `sources.py` lists; writes `databases/<name>/`, which `retrieval.Database` opens, and in it
`pictures/00000.tar`, the pictures small enough to show. Of pictures that are near copies the first stays.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from pipeline.databases.sources import Item, Source, read_items
from pipeline.download.tars import key_of, writing
from pipeline.embed import embed_images, with_vectors
from pipeline.pictures.patches import MAX_PIXELS
from pipeline.pictures.picture import prepared, stored
from pipeline.recipe import EmbedConfig
from pipeline.web.sockets import Refusal
from retrieval.clip.encoder import Encoder
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.errors import UserError
from retrieval.perceptual_hash import BLANK_HASH, MIRROR_MASK
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason

NEAR_BITS = 6
"""Largest Hamming distance of the perceptual hashes of two near copies, of 64 bits."""
NEAR_SIMILARITY = 0.9
"""What the embeddings of two pictures that look alike have at least, to be near copies."""
SHOWN_EDGE = 224
"""Shorter edge in pixels of the pictures that are kept to show."""
SHOWN_QUALITY = 90
PLACE = "pictures/00000.tar"

log = logging.getLogger("database")


@dataclass
class Seen:
    """What was found out about pictures while they were read, by id."""

    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    hashes: dict[int, int] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Collection:
    """Pictures fit for databases: equally long and in one order."""

    items: list[Item]
    table: pa.Table
    """schema.embeddings with DETAILS."""
    reasons: dict[str, int]
    """Those left out."""


def run(name: str, source: Source | Path, encoder: Encoder, config: IndexConfig, root: Root) -> Manifest:
    """Build `databases/<name>` of a source, unless it was built from just this before.

    Raises UserError if the source holds no picture, or none that can be read.
    """
    return run_all({name: ""}, source, encoder, config, root)[0]


def style_databases(name: str, source: Source) -> dict[str, str]:
    """The database of all, and those of the styles, with the style of each. Raises UserError for no style."""
    labels = sorted({item.label for item in read_items(source)[0]} - {""})
    names = {re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_"): label for label in labels}
    if len(names) < len(labels) or "" in names or name in names:
        raise UserError(
            f"the styles {', '.join(labels)} and {name!r} do not give different names. Rename one."
        )
    if not names:
        raise UserError(f"{source.path} tells no styles apart: wanted folders, or a column of labels.")
    return {name: "", **names}


def run_all(
    databases: dict[str, str], source: Source | Path, encoder: Encoder, config: IndexConfig, root: Root
) -> list[Manifest]:
    """Build several databases of one source, each of the pictures of a style, or of all where it is ''.

    Every picture is embedded once. Raises UserError as `run` does.
    """
    source = source if isinstance(source, Source) else Source(source)
    items, missing = read_items(source)
    union = next(iter(databases))
    content = _digest(items)
    made_from = {"source": content, "clip": encoder.identity.digest}
    identities = {
        name: DatabaseIdentity(f"databases/{name}", made_from | ({"style": style} if style else {}))
        for name, style in databases.items()
    }
    if all(_stands(root, identity, config) for identity in identities.values()):
        log.info("%s already built", ", ".join(databases))
        return [read_manifest(root, identity.name) for identity in identities.values()]
    found = _collect(union, items, missing, encoder)
    return [
        _build(root, found, databases[name], (encoder, config, identity))
        for name, identity in identities.items()
    ]


def _stands(root: Root, identity: DatabaseIdentity, config: IndexConfig) -> bool:
    if not root.exists(f"{identity.name}/manifest.json") or not root.exists(f"{identity.name}/{PLACE}"):
        return False
    return read_manifest(root, identity.name).fingerprint == identity.fingerprint(config)


def _collect(name: str, items: list[Item], missing: int, encoder: Encoder) -> Collection:
    ids = [schema.image_id(f"{name}/{item.name}") for item in items]
    seen = Seen()
    read, vectors = embed_images(_bytes(ids, items, seen), encoder, EmbedConfig())
    seen.reasons[Reason.UNREADABLE] += len(seen.sizes) - len(read)
    seen.reasons[Reason.NOT_FOUND] += missing
    hashes = np.array([seen.hashes[one] for one in read.tolist()], np.int64)
    fresh = ~near_copies(hashes, vectors)
    seen.reasons[Reason.NEAR_COPY] += int((~fresh).sum())
    chosen = set(read[fresh].tolist())
    kept = [(id_, item) for id_, item in zip(ids, items, strict=True) if id_ in chosen]
    table = with_vectors(_rows(name, kept, seen), vectors[fresh])
    reasons = {str(word): count for word, count in seen.reasons.items() if count}
    return Collection([item for _, item in kept], table, reasons)


def _bytes(ids: list[int], items: list[Item], seen: Seen) -> Iterator[tuple[int, bytes]]:
    """The pictures, upright and 8-bit as download stores them, without those that are none."""
    for image_id, item in zip(ids, tqdm(items, desc="database", unit="image", mininterval=0.5), strict=True):
        picture = prepared(item.read(), MAX_PIXELS, 0)
        if isinstance(picture, Refusal):
            seen.reasons[picture.reason] += 1
            continue
        seen.sizes[image_id] = picture.size
        seen.hashes[image_id] = picture.phash
        yield image_id, picture.data


def near_copies(hashes: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Which pictures look like an earlier one that stays, or like its mirror, and are close to it in CLIP.

    hashes: (n,) of `retrieval.perceptual_hash`; vectors: (n, dim) unit rows. Compares all pairs of hashes.
    """
    looks = np.flatnonzero(hashes != BLANK_HASH)
    codes = hashes[looks].view(np.uint64)
    index = faiss.IndexBinaryFlat(64)
    index.add(codes.view(np.uint8).reshape(-1, 8))
    near: dict[int, set[int]] = {}
    for turned in (np.uint64(0), MIRROR_MASK):
        # faiss wants less than the radius
        limits, _, found = index.range_search((codes ^ turned).view(np.uint8).reshape(-1, 8), NEAR_BITS + 1)
        for place, row in enumerate(looks):
            near.setdefault(int(row), set()).update(looks[found[limits[place] : limits[place + 1]]].tolist())
    dropped = np.zeros(len(hashes), bool)
    for row, others in sorted(near.items()):
        first = [one for one in others if one < row and not dropped[one]]
        dropped[row] = bool(first) and float((vectors[first] @ vectors[row]).max()) >= NEAR_SIMILARITY
    return dropped


def _rows(name: str, kept: list[tuple[int, Item]], seen: Seen) -> pa.Table:
    sizes = [seen.sizes[image_id] for image_id, _ in kept]
    columns = {
        schema.IMAGE_ID: [image_id for image_id, _ in kept],
        "url": [f"{name}/{item.name}" for _, item in kept],
        "caption": [item.caption for _, item in kept],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        schema.BOX: [None] * len(kept),
    }
    for word in ("license", "title", "artist", "source"):
        columns[word] = [getattr(item, word) or None for _, item in kept]
    return pa.table(columns, schema=pa.schema([*schema.METADATA, *schema.DETAILS]))


def _build(
    root: Root, found: Collection, style: str, made: tuple[Encoder, IndexConfig, DatabaseIdentity]
) -> Manifest:
    encoder, config, identity = made
    chosen = [i for i, item in enumerate(found.items) if style in ("", item.label)]
    identity = DatabaseIdentity(identity.name, identity.made_from, {} if style else found.reasons)
    rows = found.table.take(pa.array(chosen, pa.int64()))
    manifest = write_database(root, rows, encoder.identity, config, identity)
    _write_pictures(root, f"{identity.name}/{PLACE}", rows, [found.items[i] for i in chosen])
    left_out = "".join(f", {count} {word}" for word, count in identity.reasons.items())
    log.info("%s: %s images in %.1f s%s", identity.name, f"{len(rows):,}", manifest.seconds, left_out)
    return manifest


def _write_pictures(root: Root, name: str, rows: pa.Table, items: list[Item]) -> None:
    """A WebDataset of the pictures at SHOWN_EDGE, with what is known of each."""
    shown = rows.drop_columns([schema.EMBEDDING]).to_pylist()
    with root.writing(name) as pending, writing(pending.path) as tar:
        for row, item in zip(shown, items, strict=True):
            picture = prepared(item.read(), MAX_PIXELS, SHOWN_EDGE)
            assert not isinstance(picture, Refusal), item.name
            small = stored(picture, SHOWN_EDGE, SHOWN_QUALITY)
            tar.add(key_of(row[schema.IMAGE_ID]), small.data, row["caption"], row)


def _digest(items: list[Item]) -> str:
    """What databases of these pictures are made from: bytes, names, all that is known, and our rules."""
    digest = hashlib.sha256(f"{NEAR_BITS} {NEAR_SIMILARITY}".encode())
    for item in items:
        told = (item.name, item.label, item.caption, item.title, item.artist, item.license, item.source)
        digest.update(f"{hashlib.sha256(item.read()).hexdigest()} {told!r}\n".encode())
    return digest.hexdigest()[:16]
