"""import: stores pictures from disk as `download` stores pictures from the web.

Reads the pictures that `databases/listing.py` lists; writes `download/{train,database}/<shard>.tar` and `.parquet` as
`download` does, so that `embed` and later stages run unchanged. Reads and writes `download/import-<settings>.json`, the
ids of the pictures of each shard: known pictures stay in their shards if others are added or removed.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.databases.imagenet import with_class_names
from pipeline.databases.listing import Listing, list_pictures
from pipeline.databases.open_images import with_open_images
from pipeline.databases.sources import Content, PictureSource, SourcePicture
from pipeline.download.download import SCHEMA_VERSION, split_settings
from pipeline.download.image_download import URL_BLOCKED, PictureBuffer, RowStatus, SplitSettings, stored_image
from pipeline.download.shard_download import Rows, blocked_urls, write_rows, write_tar
from pipeline.recipe import DownloadConfig, ImportConfig
from pipeline.runtime.id_files import erased_ids
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers
from pipeline.web.blocklist import read_blocklist
from pipeline.web.urls import canonical_url
from retrieval.storage.full_disk import full_disk_named
from retrieval.storage.listing import deletion_named, described
from retrieval.storage.manifest import Manifest, ShardRecord, delete_record, read_manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, FROM_METADATA, IMAGE_ID, SPLITS, Reason, image_id, read_table
from retrieval.storage.temp_folders import temporary_folder


@dataclass(frozen=True)
class ImportedPicture:
    """A picture and its row. url: as in DOWNLOADED; address: canonical URL of its metadata, "" if none."""

    url: str
    address: str
    picture: SourcePicture

    @property
    def id(self) -> int:
        """Image id."""
        return image_id(self.url)


Shards = dict[str, list[ImportedPicture]]
Splits = dict[str, list[ImportedPicture]]
Division = dict[str, list[list[int]]]
"""The image ids of each shard, by split; also of pictures that are gone."""


@dataclass(frozen=True)
class Sources:
    """Where pictures come from. database: for the database; None: a share of `train`."""

    train: Path
    database: Path | None = None


def run(config: DownloadConfig, division: ImportConfig, sources: Sources, root: Root) -> Manifest:
    """Write `download/` from sources, unless it is finished.

    Raises UserError if a source has no picture, and if `download/` has shards of the web or of another `division`.
    """
    started = time.time()
    splits, left_out = _splits(division, sources)
    settings = json.dumps([division.model_dump(mode="json"), sources.database is not None])
    division_file = f"download/import-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.json"
    known: Division = root.find_json(division_file) or _stored_division(root, settings)
    ids = {split: _divided(splits[split], known.get(split, []), division.rows_per_shard) for split in splits}
    shards = _shards(splits, ids)
    digests = {shard: _digest(pictures) for shard, pictures in shards.items()}
    blocklist = replace(read_blocklist(config.blocklist, "download.blocklist"), erased=erased_ids(root))
    whole = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]
    by_shard = {shard: {"source": digest} for shard, digest in digests.items()}
    # `import` is compared for the whole stage: shards of the web have no such input.
    upstream, inputs = {"source": whole, "import": settings}, {"blocklist": blocklist.identity}
    stage = Stage(root, "download", SCHEMA_VERSION, config, upstream, inputs, by_shard)
    if left_out:
        stage.log.info("left out of the listing: %s", described(left_out))
    if finished := stage.finished():
        return finished
    with stage.building():
        root.write_json(division_file, ids)
        make = partial(_make_work, root, split_settings(config, blocklist), shards)
        records = run_shards(stage, [*shards], make, Workers.from_config(config))
        urls = sum(map(len, shards.values()))
        return stage.complete(records, {"urls": urls, "left_out": dict(sorted(left_out.items()))}, started)


def _stored_division(root: Root, settings: str) -> Division:
    """The ids in the shards of a finished import with these settings, which an earlier version did not list apart."""
    if not root.exists("download/manifest.json"):
        return {}
    manifest = read_manifest(root, "download")
    if manifest.upstream.get("import") != settings:
        return {}
    division: Division = {split: [] for split in SPLITS}
    for record in sorted(manifest.shards, key=lambda record: record.shard):
        split, _, name = record.shard.partition("/")
        ids = read_table(root, record.file(".parquet"), DOWNLOADED, [IMAGE_ID])[IMAGE_ID].to_pylist()
        missing = int(name.partition("-")[2]) - len(division[split])
        division[split] += [*([] for _ in range(missing)), ids]
    return division


def _splits(division: ImportConfig, sources: Sources) -> tuple[Splits, Counter[str]]:
    """The pictures of each split, and the number of those left out by reason. No id is in both splits."""
    train, left_out = _imported(sources.train, "pictures")
    if sources.database is None:
        in_database = [_draw(division.seed, picture.id) < division.database_share for picture in train]
        chosen = list(zip(train, in_database, strict=True))
        return {split: [p for p, mask in chosen if mask == (split == "database")] for split in SPLITS}, left_out
    database, left_out_too = _imported(sources.database, "database")
    ids = {picture.id for picture in train}
    disjoint = [picture for picture in database if picture.id not in ids]
    left_out += left_out_too
    if len(disjoint) < len(database):
        left_out["of the database with the URL of a training picture"] = len(database) - len(disjoint)
    return {"train": train, "database": disjoint}, left_out


def _draw(seed: int, number: int) -> float:
    """A number in [0, 1) from a seed and an image id."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:6]) / (1 << 48)


def _imported(path: Path, prefix: str) -> tuple[list[ImportedPicture], Counter[str]]:
    """The pictures of a source in its order, and the number of those left out by reason.

    prefix: of the paths that replace missing URLs of pictures.
    """
    listing = list_pictures(PictureSource(path, style_captions=True))
    described = with_class_names(with_open_images(listing.pictures, path), path)
    addresses = [canonical_url(picture.source) for picture in described]
    counts = Counter(addresses)
    pictures = []
    for picture, address in zip(described, addresses, strict=True):
        # The `source` of several pictures is a web site rather than their URL.
        url = address if address and counts[address] == 1 else f"{prefix}/{picture.name}"
        pictures.append(ImportedPicture(url, address, picture))
    return pictures, _left_out(listing)


def _left_out(listing: Listing) -> Counter[str]:
    rows = {"rows of a table without a file": listing.missing} if listing.missing else {}
    return listing.left_out + Counter(rows)


def _divided(pictures: Iterable[ImportedPicture], known: list[list[int]], rows_per_shard: int) -> list[list[int]]:
    """The image ids of each shard: known ones stay in their shards, others fill the last one, then further ones."""
    shards = [list(ids) for ids in known]
    known_ids = {image_id for ids in known for image_id in ids}
    for picture in pictures:
        if picture.id not in known_ids:
            if not shards or len(shards[-1]) >= rows_per_shard:
                shards.append([])
            shards[-1].append(picture.id)
    return shards


def _shards(splits: Splits, division: Division) -> Shards:
    """The pictures of each shard, by names as `filter` gives them."""
    shards: Shards = {}
    for split, pictures in splits.items():
        by_id = {picture.id: picture for picture in pictures}
        for number, ids in enumerate(division[split]):
            if present := [by_id[image_id] for image_id in ids if image_id in by_id]:
                shards[f"{split}/00000-{number:05d}"] = present
    return shards


@deletion_named()
def _digest(pictures: Iterable[ImportedPicture]) -> str:
    """Hash of the metadata of pictures and of the sizes and times of their files."""
    versions: dict[Path, tuple[int, int]] = {}
    digest = hashlib.sha256()
    for imported in pictures:
        picture = imported.picture
        key = (imported.url, picture.caption, picture.license, *_position(picture.content, versions))
        digest.update(f"{key!r}\n".encode())
    return digest.hexdigest()[:16]


def _position(content: Content, versions: dict[Path, tuple[int, int]]) -> Iterator[object]:
    """Size and time of the file of a picture, and the place in it. versions: of known files, is added to."""
    values = dict(vars(content))
    path = values.pop("file")
    if path not in versions:
        stat = path.stat()
        versions[path] = stat.st_size, stat.st_mtime_ns
    yield from (versions[path], *values.values())


def _make_work(root: Root, settings: dict[str, SplitSettings], shards: Shards) -> Work:
    return partial(_import_shard, root, settings, shards)


def _import_shard(root: Root, settings: dict[str, SplitSettings], shards: Shards, shard: str) -> ShardRecord:
    delete_record(root, "download", shard)  # of another blocklist: the files change now
    with ExitStack() as stack:
        path = stack.enter_context(temporary_folder()) / "pictures"
        stack.enter_context(full_disk_named(path))
        buffer = PictureBuffer(stack.enter_context(path.open("w+b")))
        rows = _store(shards[shard], settings[shard.partition("/")[0]], buffer)
        with root.writing(f"download/{shard}.tar") as tar:
            write_tar(tar.path, rows, buffer.read)
        return write_rows(root, shard, rows, tar.record)


def _store(pictures: list[ImportedPicture], settings: SplitSettings, buffer: PictureBuffer) -> Rows:
    """The rows of DOWNLOADED of pictures. Adds the stored pictures to the buffer."""
    blocked: set[int] = set()
    for urls in ([p.url for p in pictures], [p.address for p in pictures]):
        ids = np.array([image_id(url) for url in urls], np.int64)
        blocked |= blocked_urls(pa.table({IMAGE_ID: ids, "url": pa.array(urls, pa.string())}), settings.blocklist)
    rows = []
    for number, imported in enumerate(pictures):
        status, stored = RowStatus(str(Reason.BLOCKED), URL_BLOCKED), b""
        if number not in blocked:
            status, stored = _read(imported.picture.content, settings)
        if stored:
            buffer.add(number, stored)
        picture = imported.picture
        own = {
            IMAGE_ID: imported.id,
            "url": imported.url,
            "caption": picture.caption,
            "license": picture.license or None,
        }
        rows.append(dict.fromkeys(FROM_METADATA) | own | vars(status))
    return rows


def _read(content: Content, settings: SplitSettings) -> tuple[RowStatus, bytes]:
    try:
        return stored_image(content.read(), settings)
    except FileNotFoundError:
        return RowStatus(str(Reason.NOT_FOUND), "its file is gone"), b""
