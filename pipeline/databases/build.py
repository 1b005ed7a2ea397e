"""database: builds a style database from a collection of pictures, and optionally one for each style.

Reads the pictures that `listing.py` lists; writes `databases/<name>/`, which `retrieval.Database` opens, with
thumbnails in `pictures/00000.tar`. Of near copies only the first picture is kept.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from tqdm import tqdm

from pipeline.databases.labels import database_names
from pipeline.databases.listing import Listing, list_pictures
from pipeline.databases.sources import PictureSource, SourcePicture, further_columns
from pipeline.embed import embed_images, with_vectors
from pipeline.pictures.picture import encode, prepare
from pipeline.pictures.tars import tar_writer
from pipeline.recipe import EmbedConfig
from pipeline.runtime.id_files import Ids, erased_ids
from retrieval.clip.encoder import Encoder
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.database.calibration import recalibrate, sample_captions
from retrieval.database.database import Database
from retrieval.database.stored_manifest import SCHEMA_VERSION
from retrieval.errors import UserError
from retrieval.index.routing import unit
from retrieval.perceptual_hash import BLANK_HASH, MIRROR_MASK
from retrieval.pictures.decode import MAX_PIXELS, PictureError
from retrieval.recipe import IndexConfig
from retrieval.storage import schema
from retrieval.storage.listing import deletion_named, described
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason, sample_key
from retrieval.storage.stage_folder import StageIdentity, check_remake

NEAR_BITS = 6
"""Largest Hamming distance of the perceptual hashes of two near copies, of 64 bits."""
NEAR_SIMILARITY = 0.9
"""Least cosine similarity of the CLIP vectors of two near copies."""
THUMBNAIL_EDGE = 224
"""Shorter edge of thumbnails in pixels; smaller pictures keep their size."""
THUMBNAIL_QUALITY = 90
THUMBNAILS = "pictures/00000.tar"

log = logging.getLogger("database")


@dataclass
class PictureProperties:
    """Sizes and perceptual hashes of the pictures read so far, by image id; pictures left out, by reason."""

    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    hashes: dict[int, int] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class EmbeddedPictures:
    """The pictures of the databases: `pictures`, the rows of `table` and `is_first` have the same order."""

    pictures: list[SourcePicture]
    table: pa.Table
    """schema.embeddings with DETAILS."""
    is_first: npt.NDArray[np.bool_]
    """Whether a picture is no near copy of an earlier one of any style."""
    reasons: dict[str, int]
    """Number of pictures left out, by reason."""


def run(name: str, source: PictureSource | Path, encoder: Encoder, config: IndexConfig, root: Root) -> Manifest:
    """Build `databases/<name>` from a source, unless it exists with the same pictures and settings.

    Raises UserError if the source has no readable picture, and as `check_remake`.
    """
    return run_all({name: ""}, source, encoder, config, root)[0]


def style_databases(name: str, source: PictureSource) -> dict[str, str]:
    """The style of each database by its name; "" for all pictures. Raises UserError if there is no style."""
    labels = sorted({picture.label for picture in list_pictures(source).pictures} - {""})
    if not labels:
        raise UserError(f"{source.path} has no styles. Wanted: folders by style, or a column of labels.")
    return {name: "", **database_names(labels, name)}


def run_all(
    databases: dict[str, str], source: PictureSource | Path, encoder: Encoder, config: IndexConfig, root: Root
) -> list[Manifest]:
    """Build several databases (see `style_databases`) of one source; each picture is embedded once. Raises as `run`.

    A style without a readable picture gives no database and a warning.
    """
    source = source if isinstance(source, PictureSource) else PictureSource(source)
    listing = list_pictures(source)
    if listing.left_out:
        log.info("%s: left out of the listing: %s", source.path, described(listing.left_out))
    inputs = {"source": _digest(listing.pictures), "clip": encoder.identity.digest}
    identities = {
        name: DatabaseIdentity(f"databases/{name}", inputs | ({"style": style} if style else {}))
        for name, style in databases.items()
    }
    if all(_is_built(root, identity, config) for identity in identities.values()):
        log.info("%s already built", ", ".join(databases))
        return [read_manifest(root, identity.name) for identity in identities.values()]
    for identity in identities.values():
        check_remake(root, identity.name, StageIdentity.of(identity.name, SCHEMA_VERSION, config, identity.upstream))
    embedded = _embed_pictures(next(iter(databases)), listing, encoder, erased_ids(root))
    labels = {picture.label for picture in embedded.pictures}
    if empty := [style for style in databases.values() if style and style not in labels]:
        log.warning("no database for %s: none of its pictures can be read", ", ".join(empty))
    return [
        _build(root, embedded, databases[name], (encoder, config, identity))
        for name, identity in identities.items()
        if databases[name] in ("", *labels)
    ]


def _is_built(root: Root, identity: DatabaseIdentity, config: IndexConfig) -> bool:
    if not root.exists(f"{identity.name}/manifest.json") or not root.exists(f"{identity.name}/{THUMBNAILS}"):
        return False
    return read_manifest(root, identity.name).fingerprint == identity.fingerprint(config)


def _embed_pictures(name: str, listing: Listing, encoder: Encoder, erased: Ids) -> EmbeddedPictures:
    all_ids = [schema.image_id(f"{name}/{picture.name}") for picture in listing.pictures]
    numbers = np.flatnonzero(~np.isin(all_ids, erased)).tolist()
    pictures, ids = [listing.pictures[n] for n in numbers], [all_ids[n] for n in numbers]
    properties = PictureProperties()
    properties.reasons[Reason.BLOCKED] += len(all_ids) - len(ids)
    embedded_ids, vectors = embed_images(_read(ids, pictures, properties), encoder, EmbedConfig())
    properties.reasons[Reason.UNREADABLE] += len(properties.sizes) - len(embedded_ids)
    properties.reasons[Reason.NOT_FOUND] += listing.missing
    hashes = np.array([properties.hashes[image_id] for image_id in embedded_ids.tolist()], np.int64)
    units = unit(vectors)
    is_first = ~find_near_copies(hashes, units)
    properties.reasons[Reason.NEAR_COPY] += int((~is_first).sum())
    picture_of = dict(zip(ids, pictures, strict=True))
    labels = np.array([picture_of[image_id].label for image_id in embedded_ids.tolist()])
    keep = is_first.copy()
    for label in np.unique(labels):  # a style keeps its picture if another style has a copy
        rows = np.flatnonzero(labels == label)
        keep[rows] |= ~find_near_copies(hashes[rows], units[rows])
    kept = {image_id: picture_of[image_id] for image_id in embedded_ids[keep].tolist()}
    table = with_vectors(_metadata(name, kept, properties), vectors[keep])
    reasons = {str(reason): count for reason, count in properties.reasons.items() if count}
    return EmbeddedPictures([*kept.values()], table, is_first[keep], reasons)


def _read(ids: list[int], pictures: list[SourcePicture], properties: PictureProperties) -> Iterator[tuple[int, bytes]]:
    """Ids and bytes of the readable pictures, upright and 8-bit as in `download`."""
    bar = tqdm(pictures, desc="database", unit="image", mininterval=0.5)
    for image_id, source in zip(ids, bar, strict=True):
        try:
            with deletion_named():
                data = source.content.read()
            picture = prepare(data, MAX_PIXELS, 0)
        except PictureError as error:
            properties.reasons[error.reason] += 1
            continue
        properties.sizes[image_id] = picture.size
        properties.hashes[image_id] = picture.phash
        yield image_id, picture.data


def find_near_copies(hashes: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Mask of the pictures that are near copies of an earlier picture that is kept, or of its mirror image.

    hashes: (n,) of `retrieval.perceptual_hash`, all pairs are compared; vectors: (n, dim) unit rows, close as well.
    """
    hashed = np.flatnonzero(hashes != BLANK_HASH)
    codes = hashes[hashed].view(np.uint64)
    index = faiss.IndexBinaryFlat(64)
    index.add(codes.view(np.uint8).reshape(-1, 8))
    similar: dict[int, set[int]] = {}
    for mask in (np.uint64(0), MIRROR_MASK):
        queries = (codes ^ mask).view(np.uint8).reshape(-1, 8)
        limits, _, matches = index.range_search(queries, NEAR_BITS + 1)  # faiss excludes the radius itself
        for number, row in enumerate(hashed):
            rows = hashed[matches[limits[number] : limits[number + 1]]]
            similar.setdefault(int(row), set()).update(rows.tolist())
    dropped = np.zeros(len(hashes), bool)
    for row, similar_rows in sorted(similar.items()):
        earlier = [candidate for candidate in similar_rows if candidate < row and not dropped[candidate]]
        dropped[row] = bool(earlier) and float((vectors[earlier] @ vectors[row]).max()) >= NEAR_SIMILARITY
    return dropped


def _metadata(name: str, pictures: dict[int, SourcePicture], properties: PictureProperties) -> pa.Table:
    """The columns of schema.METADATA and DETAILS, `style` (the label), and further ones. pictures: by image id."""
    sizes = [properties.sizes[image_id] for image_id in pictures]
    columns = {
        schema.IMAGE_ID: [*pictures],
        "url": [f"{name}/{picture.name}" for picture in pictures.values()],
        "caption": [picture.caption for picture in pictures.values()],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        **{unknown: [None] * len(pictures) for unknown in (schema.NORM, schema.BOX)},
    }
    for column in ("license", "title", "artist", "source"):
        columns[column] = [getattr(picture, column) or None for picture in pictures.values()]
    table = pa.table(columns, schema=pa.schema([*schema.METADATA, *schema.DETAILS]))
    style = pa.array([picture.label or None for picture in pictures.values()], pa.string())
    for column, values in {"style": style, **further_columns(pictures.values())}.items():
        table = table.append_column(column, values)
    return table


def _build(
    root: Root, embedded: EmbeddedPictures, style: str, settings: tuple[Encoder, IndexConfig, DatabaseIdentity]
) -> Manifest:
    encoder, config, identity = settings
    is_row = embedded.is_first if not style else [picture.label == style for picture in embedded.pictures]
    rows = np.flatnonzero(is_row).tolist()
    identity = DatabaseIdentity(identity.name, identity.upstream, {} if style else embedded.reasons)
    table = embedded.table.take(pa.array(rows, pa.int64()))
    root.delete(f"{identity.name}/{THUMBNAILS}")  # those of an earlier build
    with ExitStack() as incomplete:
        incomplete.callback(root.delete, f"{identity.name}/manifest.json")  # no database without its pictures
        manifest = write_database(root, table, encoder.identity, config, identity)
        _calibrate_for_texts(root.child(identity.name), encoder, config)
        _write_thumbnails(root, f"{identity.name}/{THUMBNAILS}", table, [embedded.pictures[i] for i in rows])
        incomplete.pop_all()
    left_out = "".join(f", {count} {reason}" for reason, count in identity.reasons.items())
    log.info("%s: %s images in %.1f s%s", identity.name, f"{len(table):,}", manifest.seconds, left_out)
    return manifest


def _calibrate_for_texts(root: Root, encoder: Encoder, config: IndexConfig) -> None:
    """Measure the recall of searches for texts with captions of the database, unless every search is exact."""
    database = Database.open(root)
    captions = [] if database.is_exact else sample_captions(database, config.num_queries, config.seed)
    if captions:
        recalibrate(root, encoder.encode_texts(captions), "texts")


def _write_thumbnails(root: Root, name: str, table: pa.Table, pictures: list[SourcePicture]) -> None:
    """Write a WebDataset of the pictures at THUMBNAIL_EDGE with their metadata."""
    rows = table.drop_columns([schema.EMBEDDING]).to_pylist()
    with root.writing(name) as pending, tar_writer(pending.path) as tar:
        for row, source in zip(rows, pictures, strict=True):
            try:
                picture = prepare(source.content.read(), MAX_PIXELS, THUMBNAIL_EDGE)
                thumbnail = encode(picture, THUMBNAIL_QUALITY)
            except (PictureError, OSError) as error:
                raise UserError(f"{source.name} changed while the database was built: {error}. Run again.") from error
            tar.add(sample_key(row[schema.IMAGE_ID]), thumbnail.data, row["caption"], row)


@deletion_named()
def _digest(pictures: list[SourcePicture]) -> str:
    """Hash of the bytes and metadata of the pictures, and of the limits for near copies."""
    digest = hashlib.sha256(f"{NEAR_BITS} {NEAR_SIMILARITY}".encode())
    for p in pictures:
        metadata = (p.name, p.label, p.caption, p.title, p.artist, p.license, p.source, *sorted(p.further.items()))
        digest.update(f"{hashlib.sha256(p.content.read()).hexdigest()} {metadata!r}\n".encode())
    return digest.hexdigest()[:16]
