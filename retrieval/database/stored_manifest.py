"""The manifest of a database, compared with the files in its folder. An update can replace both meanwhile."""

from retrieval.errors import UserError
from retrieval.index.routing import file_records
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root

SCHEMA_VERSION = 6
"""Version of the files of a database. Databases of other versions are refused."""
MAX_READS = 5
"""How often the manifest is read again because updates replace it."""


def stored_manifest(root: Root) -> Manifest:
    """The manifest of the database at a root. Raises UserError if it is no database, unfinished or damaged."""
    manifest = database_manifest(root)
    for _ in range(MAX_READS):
        if not (damage := _damage(root, manifest)):
            return manifest
        before, manifest = manifest, database_manifest(root)
        if manifest == before:
            break
    raise UserError(f"{damage}: the database is damaged. Copy or build it again.")


def database_manifest(root: Root) -> Manifest:
    """As `stored_manifest`, without a comparison with the files."""
    try:
        manifest = read_manifest(root, "")
    except UserError:
        if root.exists("manifest.json"):
            raise
        raise UserError(
            f"{root.url} is no database: it has no manifest.json. Name the folder of a finished database, or run the "
            "build or merge that did not finish there again."
        ) from None
    if "encoder" not in manifest.values or "rows" not in manifest.values:
        raise UserError(f"{root.url} is the output of stage {manifest.stage!r}; expected a database.")
    if manifest.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"{root.url} is a database of version {manifest.schema_version}; this code reads version "
            f"{SCHEMA_VERSION}. Build it again."
        )
    return manifest


def _damage(root: Root, manifest: Manifest) -> str:
    """The first file that is missing or has another size than the manifest states; "" if there is none."""
    sizes = root.sizes("")
    for name, file in file_records(manifest).items():
        if (size := sizes.get(name, -1)) != file.bytes:
            found = f"has {size:,} bytes" if size >= 0 else "is missing"
            return f"{root.at(name)} {found}, expected {file.bytes:,} bytes (manifest.json)"
    return ""
