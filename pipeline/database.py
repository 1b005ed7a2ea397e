"""database: a style database from a folder of images.

Reads every picture below a folder; writes the database `databases/<name>/` that `retrieval.Database`
opens. A picture's caption is the text file beside it (`a.jpg`, `a.txt`), or else its file name.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from pipeline.embed import MAX_PIXELS, EmbedConfig, embed_images, with_vectors
from pipeline.picture import prepared
from pipeline.sockets import Refusal
from retrieval import schema
from retrieval.build import Identity, IndexConfig, build_database
from retrieval.encoder import Encoder
from retrieval.errors import UserError
from retrieval.manifest import Manifest, read_manifest
from retrieval.schema import Reason
from retrieval.storage import Root, file_sha256

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_CAPTION_BYTES = 4096

log = logging.getLogger("database")


def run(name: str, source: Path, encoder: Encoder, config: IndexConfig, root: Root) -> Manifest:
    """Build `databases/<name>` from the pictures in a folder, unless it was built from just these before.

    Raises UserError if the folder holds no picture, or none that can be read.
    """
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    if not paths:
        raise UserError(f"{source} holds no picture ({' '.join(PICTURES)}). Name a folder of images.")
    content = _digest(source, paths)
    made_from = {"source": content, "clip": encoder.identity.digest}
    where = f"databases/{name}"
    wanted = Identity(where, made_from).fingerprint(config)
    if root.exists(f"{where}/manifest.json") and (found := read_manifest(root, where)).fingerprint == wanted:
        log.info("%s already built: %s images", name, f"{found.rows:,}")
        return found
    ids = [schema.image_id(f"{name}/{path.relative_to(source).as_posix()}") for path in paths]
    read, vectors = embed_images(_bytes(ids, paths), encoder, EmbedConfig())
    kept = np.isin(ids, read)
    rows = _rows(name, source, [path for path, keep in zip(paths, kept, strict=True) if keep])
    unreadable = len(paths) - len(rows)
    reasons = {Reason.UNREADABLE: unreadable} if unreadable else {}
    identity = Identity(where, made_from, {str(word): count for word, count in reasons.items()})
    manifest = build_database(root, with_vectors(rows, vectors), encoder.identity, config, identity)
    log.info(
        "%s: %s images in %.1f s, %d unreadable", name, f"{manifest.rows:,}", manifest.seconds, unreadable
    )
    return manifest


def _digest(source: Path, paths: list[Path]) -> str:
    lines = [
        f"{path.relative_to(source).as_posix()} {file_sha256(path)} {_caption(path)!r}" for path in paths
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _bytes(ids: list[int], paths: list[Path]) -> Iterator[tuple[int, bytes]]:
    """The pictures, upright and 8-bit as download stores them; no bytes for those that are none."""
    for image_id, path in zip(ids, paths, strict=True):
        picture = prepared(path.read_bytes(), MAX_PIXELS, 0)
        yield image_id, b"" if isinstance(picture, Refusal) else picture.data


def _rows(name: str, source: Path, paths: list[Path]) -> pa.Table:
    names = [f"{name}/{path.relative_to(source).as_posix()}" for path in paths]
    sizes = [_size(path) for path in paths]
    columns = {
        schema.IMAGE_ID: [schema.image_id(text) for text in names],
        "url": names,
        "caption": [_caption(path) for path in paths],
        "license": [None] * len(paths),
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
    }
    return pa.table(columns, schema=schema.METADATA)


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except (Image.DecompressionBombError, UnidentifiedImageError, OSError):
        return 0, 0


def _caption(path: Path) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        return beside.read_bytes()[:MAX_CAPTION_BYTES].decode(errors="replace").strip()
    return path.stem.replace("_", " ").replace("-", " ")
