"""Calibrations that were measured after the build: `calibration/<kind>.json` in the folder of a database.

Each kind of queries has a file of its own, so that calibrations for two kinds at the same time lose nothing. A file
names the database that it was measured on; another build makes it void.
"""

from typing import Any

from retrieval.errors import UserError
from retrieval.index.effort import QUERY_KINDS, MeasuredEffort
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root

FOLDER = "calibration"


def read_calibrations(root: Root, manifest: Manifest) -> dict[str, list[MeasuredEffort]]:
    """The calibration for each kind of queries: that of the build, or a later one. Raises UserError if damaged."""
    entries: dict[str, list[dict[str, Any]]] = dict(manifest.values["calibration"])
    for kind in QUERY_KINDS:
        name = f"{FOLDER}/{kind}.json"
        if root.exists(name):
            stored = root.read_json(name)
            if not isinstance(stored, dict) or {"database", "entries"} - set(stored):
                raise UserError(f"{root.at(name)} is no calibration. Remove it and calibrate again.")
            if stored["database"] == manifest.identity:
                entries[kind] = stored["entries"]
    try:
        return {kind: [MeasuredEffort.from_manifest(entry) for entry in entries[kind]] for kind in entries}
    except (TypeError, KeyError) as error:
        raise UserError(f"{root.url} has a damaged calibration ({error}). Build it again.") from error


def was_recalibrated(root: Root, manifest: Manifest, kind: str) -> bool:
    """Whether `write_calibration` was called for the database with this manifest and a kind of queries."""
    stored = root.find_json(f"{FOLDER}/{kind}.json")
    return isinstance(stored, dict) and stored.get("database") == manifest.identity


def write_calibration(root: Root, manifest: Manifest, kind: str, entries: list[dict[str, Any]]) -> None:
    """Store the calibration of the database with this manifest for a kind of queries."""
    root.write_json(f"{FOLDER}/{kind}.json", {"database": manifest.identity, "entries": entries})
