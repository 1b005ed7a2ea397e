"""Readers of folders and of WebDataset tars.

A folder can contain pictures with captions in text or JSON files of the same name or in tables as those of an
ImageFolder of Hugging Face, tars, and Parquet or Arrow files with pictures. Files of tools are left out
(`retrieval.storage.listing`); what is left out is counted by reason.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.databases.imagenet import CLASS_NUMBER
from pipeline.databases.sources import (
    SIGNATURE_BYTES,
    Fields,
    FileRange,
    Item,
    check_names,
    is_picture,
    joined,
    read_fields,
    text_of,
)
from pipeline.databases.tables import IMAGE_TABLES, TABLES, described_files, image_items
from retrieval.errors import UserError
from retrieval.storage.data_files import RepeatedKeyError, unique_keys
from retrieval.storage.listing import HIDDEN, escaped_text, is_hidden, list_files, safe_text

METADATA_SUFFIXES = ("txt", "cls", "json")
SIDECAR_SUFFIXES = (".txt", ".json")
METADATA_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of an ImageFolder of Hugging Face; their rows describe files in their folder."""
REPEATED = "with the name of another"
WITHOUT_PICTURE = "a caption or metadata file without a picture of its name"
WITHOUT_OWN_FILE = "a row of a metadata table without a file of its own"
DAMAGED = "a JSON file that is damaged or no object"
UNPACKING = {
    **dict.fromkeys((".gz", ".tgz"), "gzip -dk"),
    **dict.fromkeys((".bz2", ".tbz", ".tbz2"), "bzip2 -dk"),
    **dict.fromkeys((".xz", ".txz"), "xz -dk"),
    **{".zst": "zstd -d", ".zip": "unzip"},
}
"""Commands that unpack files, by suffix."""
END_BYTES = 1 << 20
"""Bytes that are checked at the end of a tar. Some writers fill its last record, of any size, with zeros."""


def hub_folder(path: Path) -> Path | None:
    """The folder of a Hugging Face cache (with `blobs` and `snapshots`) that a path is in, or None."""
    for folder in (path, *path.parents):
        if (folder / "blobs").is_dir() and (folder / "snapshots").is_dir():
            return folder
    return None


def snapshot(path: Path) -> Path:
    """The newest snapshot of a Hugging Face cache folder; another path as it is. Raises UserError if not known."""
    if hub_folder(path) != path:
        return path
    main = path / "refs" / "main"
    revisions = sorted(child.name for child in (path / "snapshots").iterdir() if not is_hidden(child.name))
    revision = main.read_text().strip() if main.is_file() else ""
    if revision not in revisions and len(revisions) != 1:
        raise UserError(f"{path} has the snapshots {', '.join(revisions)}. Name the folder of one as the source.")
    return path / "snapshots" / (revision if revision in revisions else revisions[0])


def folder_items(folder: Path, left_out: Counter[str]) -> Iterator[Item]:
    """The pictures of a folder in the order of its files. left_out: counts files by the reason, is added to."""
    hub = hub_folder(folder.absolute())
    link_targets = [(hub / "blobs").resolve()] if hub else []
    names, hidden = list_files(folder, link_targets)
    left_out.update(hidden)
    tars = [name for name in names if name.lower().endswith(".tar")]
    suffixes = {name: PurePosixPath(name).suffix.lower() for name in names}
    texts = [name for name in names if suffixes[name] in SIDECAR_SUFFIXES]
    sidecars = {str(PurePosixPath(name).with_suffix(suffixes[name])): folder / name for name in texts}
    read: dict[str, dict[str, Any]] = {}
    tables, described = _read_metadata_tables(folder, names, link_targets, left_out)
    for name in names:
        path, suffix = folder / name, suffixes[name]
        if name in tables:
            continue
        if name in tars:
            yield from tar_items(path, name[: -len(".tar")], left_out, len(tars) > 1)
        elif suffix in IMAGE_TABLES:
            yield from image_items(path, safe_text(name[: -len(suffix)]), left_out)
        elif is_picture(name, FileRange(path, 0, SIGNATURE_BYTES).read()):
            fields = described.get(name, {})
            for kind in ("json", "txt"):
                key = str(PurePosixPath(name).with_suffix(f".{kind}"))
                if key in sidecars and key not in read:
                    read[key] = _member_fields(sidecars[key], sidecars[key].read_bytes(), left_out)
                fields = joined(fields, read.get(key, {}))
            text, other = safe_text(name), escaped_text(name)
            yield Item(text, FileRange(path), fields, PurePosixPath(text).parts[:-1], other if other != text else "")
        elif suffix not in SIDECAR_SUFFIXES:
            left_out[_other_kind(suffix, is_in_folder=True)] += 1
    left_out[WITHOUT_PICTURE] += len(texts) - len(read)


def _read_metadata_tables(
    folder: Path, names: list[str], link_targets: list[Path], left_out: Counter[str]
) -> tuple[set[str], dict[str, Fields]]:
    """The names of the METADATA_TABLES among the files of a folder, and the fields of the files that they describe.

    link_targets: resolved folders. left_out: counts rows, is added to.
    """
    tables: set[str] = set()
    described: dict[str, Fields] = {}
    candidates = [name for name in names if PurePosixPath(name).name.lower() in METADATA_TABLES]
    for name in sorted(candidates, key=lambda name: -name.count("/")):  # the nearest table of a file counts
        root = (folder / name).parent.resolve()
        rows = described_files(folder / name, [root, *link_targets])
        if rows is None:
            continue
        tables.add(name)
        for file, fields in rows:
            key = str(PurePosixPath(name).parent / file.relative_to(root)) if file else ""
            if file and key not in described:
                described[key] = fields
            else:
                left_out[WITHOUT_OWN_FILE] += 1
    return tables, described


def tar_items(path: Path, name: str, left_out: Counter[str], is_one_of_many: bool = False) -> Iterator[Item]:
    """The pictures of a tar in the order of their names, with their captions, classes and JSON fields.

    name: of the tar in the source, without suffix. A tar is a style if its name is that of a class of ImageNet, or if
    there are others and its name ends in no digit, as those of shards do.
    """
    pictures, metadata = _read_tar(path, left_out)
    fields: dict[str, dict[str, Any]] = {}
    for member_name, values in metadata.items():
        fields.setdefault(_stem(member_name), {}).update(values)
    used = {stem for member_name in pictures for stem in _stems(member_name)}
    left_out[WITHOUT_PICTURE] += sum(_stem(member_name) not in used for member_name in metadata)
    parents = PurePosixPath(safe_text(name)).parts
    is_style = CLASS_NUMBER.fullmatch(parents[-1]) or (is_one_of_many and not parents[-1][-1].isdigit())
    style = parents[-1:] if is_style else ()
    for member_name, content in sorted(pictures.items()):
        relative = PurePosixPath(safe_text(member_name).lstrip("/"))  # an absolute name would replace that of the tar
        escaped = escaped_text(member_name).lstrip("/")
        folders = (*parents[:-1], *(relative.parts[:-1] or style))
        other = PurePosixPath(safe_text(name + path.suffix), escaped).as_posix()
        in_source = PurePosixPath(safe_text(name), relative).as_posix()
        sample, picture = _stems(member_name)
        yield Item(in_source, content, fields.get(sample, {}) | fields.get(picture, {}), folders, other)


def _read_tar(path: Path, left_out: Counter[str]) -> tuple[dict[str, FileRange], dict[str, dict[str, Any]]]:
    """The pictures of a tar, and the fields of its metadata files, by the names of the members."""
    pictures: dict[str, FileRange] = {}
    metadata: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if reason := _member_reason(tar, member):
                    left_out[reason] += 1
                    continue
                left_out[REPEATED] += member.name in pictures or member.name in metadata
                name = Path(f"{path}/{member.name}")
                if name.suffix[1:].lower() in METADATA_SUFFIXES:
                    metadata[member.name] = _member_fields(name, _bytes(tar, member), left_out)
                else:
                    pictures[member.name] = FileRange(path, member.offset_data, member.size)
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not a readable tar without compression: {error}. Decompress it (for example with gzip -d)"
            " if it is compressed, else get it again."
        ) from error
    return pictures, metadata


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


def _stems(name: str) -> tuple[str, str]:
    """The names without suffix of the metadata files of a picture in a tar.

    They are named as it up to its first dot, as in WebDataset, or up to its last.
    """
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}", f"{folder}{slash}{PurePosixPath(base).stem}"


def _check_end(path: Path, offset: int) -> None:
    """Raises UserError if no zero block or more than zeros follow the last member that tarfile found in a tar.

    tarfile treats the place where a tar was cut off, a damaged header and the end of the first of two joined tars as
    the end. offset: of that end.
    """
    rest = FileRange(path, offset, END_BYTES).read()
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise UserError(
            f"{path} cannot be read beyond byte {offset:,} of {path.stat().st_size:,}: found no end of a tar there,"
            " wanted blocks of zeros. It was cut off, is damaged or consists of several tars. Get it again, or pack its"
            " files again."
        )


def _member_reason(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """Why a member of a tar is left out; "" for pictures and their metadata."""
    if is_hidden(member.name):
        return HIDDEN
    if not member.isfile():
        return "a link in a tar"
    suffix = PurePosixPath(member.name).suffix.lower()
    if suffix[1:] in METADATA_SUFFIXES or is_picture(member.name, _bytes(tar, member, SIGNATURE_BYTES)):
        return ""
    return _other_kind(suffix)


def _other_kind(suffix: str, is_in_folder: bool = False) -> str:
    advice = f": {UNPACKING[suffix]} unpacks it" if suffix in UNPACKING else ""
    if is_in_folder and suffix in TABLES:
        advice = ": name it as the source if its rows name pictures"
    return f"of another kind ({safe_text(suffix) or 'no suffix'}{advice})"


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int = -1) -> bytes:
    file = tar.extractfile(member)
    return file.read(size) if file else b""


def _member_fields(path: Path, data: bytes, left_out: Counter[str]) -> dict[str, Any]:
    """The fields of a metadata file: a caption (txt), a class (cls) or a JSON object. path: also of a tar's member."""
    if (suffix := path.suffix.lower()) != ".json":
        return {"caption" if suffix == ".txt" else "label": text_of(data)}
    try:
        content = json.loads(data, object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        raise UserError(f"{path}: {error}. Wanted: each key once. Remove or rename one.") from error
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        left_out[DAMAGED] += 1
        return {}
    check_names(content, path)
    return read_fields(content)
