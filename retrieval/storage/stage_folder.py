"""The folder of a stage: continued while its settings and inputs stay the same, emptied when they change.

Reads and writes `<stage>/started.json`, which states what the files in the folder were made from. Finished shards can
be weeks of work, so they are deleted only if the root permits it (`--remake`), and the loss is stated first.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage.manifest import fingerprint, read_manifest
from retrieval.storage.root import Root

STARTED_FILE = "started.json"
SHARDS_PER_PART = 5_000
"""Shards of a part of a listing: five pages of their records, or ten of two files each."""
MAX_DIFFERENCES = 3
"""Differing settings that a message lists."""


@dataclass(frozen=True)
class StageIdentity:
    """What determines the output of a stage. settings: `Config.output_fields`; upstream: identities of its inputs.

    shard_fingerprint: the same without the inputs that are compared shard by shard. Shards with it are kept.
    """

    fingerprint: str
    shard_fingerprint: str
    schema_version: int
    settings: dict[str, Any]
    upstream: dict[str, str]

    @classmethod
    def of(
        cls, stage: str, schema_version: int, config: Config, upstream: dict[str, str], by_shard: Collection[str] = ()
    ) -> "StageIdentity":
        """The identity of a stage with these settings and inputs.

        stage: its name in fingerprints. by_shard: names of inputs that are compared shard by shard.
        """
        shared = {name: identity for name, identity in upstream.items() if name not in by_shard}
        whole, of_shards = (fingerprint(stage, schema_version, config, inputs) for inputs in (upstream, shared))
        return cls(whole, of_shards, schema_version, config.output_fields(), shared)


def prepare_folder(
    root: Root, folder: str, identity: StageIdentity, kept: tuple[str, ...] = (), keep_manifest: bool = False
) -> None:
    """Prepare the folder of a stage that did not finish with this identity. Call it before the first shard is written.

    Deletes the manifest and unfinished files; if the identity differs, everything but names that begin with one of
    `kept`. keep_manifest: if the identity is the same, the manifest stays. Raises as `check_remake`.
    """
    is_same = check_remake(root, folder, identity)
    if not (is_same and keep_manifest):
        root.delete(f"{folder}/manifest.json")
    if is_same:
        root.delete_partial_files(folder)
    elif kept:
        root.delete_except(folder, kept)
    else:
        root.delete(folder)
    root.write_json(f"{folder}/{STARTED_FILE}", asdict(identity))


def check_remake(root: Root, folder: str, identity: StageIdentity) -> bool:
    """True if the shards of a folder have this identity, but for inputs that are compared shard by shard.

    Raises UserError if it has finished shards of another identity, unless `root.remake` permits to delete them. The
    error, or then a warning in the log, states what is deleted and which settings or inputs changed.
    """
    stored = stored_identity(root, folder)
    if (
        stored.get("shard_fingerprint") == identity.shard_fingerprint
        or stored.get("fingerprint") == identity.fingerprint
    ):
        return True
    contents = _finished_contents(root, folder)
    if not contents:
        return False
    loss = f"{root.at(folder)} has {contents}, made {changes(stored, identity)}."
    if not root.remake:
        raise UserError(
            f"{loss} They are kept: nothing was done. To delete them and make them again, repeat the command with"
            " --remake (make: ARGS=--remake). To keep them, undo the change, or set another root."
        )
    logging.getLogger(folder).warning("%s They are deleted now and made again (--remake).", loss)
    return False


def changes(stored: Mapping[str, Any], identity: StageIdentity) -> str:
    """How a stored identity differs, in words: `with k = 4, the recipe has 8; from another download`."""
    settings = stored.get("settings") or stored.get("config")  # the name in manifests
    if settings is None:
        return "by an earlier version of the code"
    upstream = stored["upstream"]
    inputs = [f"from another {name}" for name in identity.upstream if upstream.get(name) != identity.upstream[name]]
    inputs += [f"also from {name}" for name in upstream if name not in identity.upstream]
    version = stored["schema_version"]
    formats = [] if version == identity.schema_version else [f"in format {version}, now {identity.schema_version}"]
    differences = setting_differences(settings, identity.settings)
    return "; ".join([*differences, *inputs, *formats]) or "by another version of the code"


def setting_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """The settings that differ, as `with k = 4, the recipe has 8`; of many only the first."""
    old, new = dict(_flat(stored)), dict(_flat(current))
    differences = [
        f"with {name} = {old[name]!r}, the recipe has {value!r}" if name in old else f"without {name}"
        for name, value in new.items()
        if name not in old or old[name] != value
    ]
    extra = len(differences) - MAX_DIFFERENCES
    return [*differences[:MAX_DIFFERENCES], *([f"{extra} more differences"] if extra > 0 else [])]


def _flat(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in sections.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def stored_identity(root: Root, folder: str) -> dict[str, Any]:
    """The content of started.json or, if only a manifest was written, of the manifest; empty without both."""
    for name in (STARTED_FILE, "manifest.json"):
        if root.exists(f"{folder}/{name}"):
            return dict(root.read_json(f"{folder}/{name}"))
    return {}


def _finished_contents(root: Root, folder: str) -> str:
    """Number of finished shards of a folder, and of all its files and bytes; "" if no shard is finished."""
    if not root.exists(f"{folder}/records") and not root.exists(f"{folder}/manifest.json"):
        return ""
    sizes = root.sizes(folder)
    shards = sum(name.startswith(f"{folder}/records/") for name in sizes)
    if not shards and f"{folder}/manifest.json" in sizes:
        shards = max(1, len(read_manifest(root, folder).shards))
    if not shards:
        return ""
    size = sum(sizes.values())
    amount = f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
    return f"{shards:,} finished {'shard' if shards == 1 else 'shards'} ({len(sizes):,} files, {amount})"


def listing_splits(folder: str, shards: Iterable[str]) -> list[str]:
    """Names that divide the listing of a stage's folder into parts of SHARDS_PER_PART shards (`Root.files`)."""
    ends = sorted(shards)[SHARDS_PER_PART::SHARDS_PER_PART]
    return sorted(f"{place}/{shard}" for place in (folder, f"{folder}/records") for shard in ends)
