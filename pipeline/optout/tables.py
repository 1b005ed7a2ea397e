"""Removes the hidden images of the training database from the neighbor tables.

Reads the tables and the database; writes `optout/<list>/neighbors/`, then the tables that change, the manifest last.
"""

from dataclasses import asdict, dataclass, replace

from pipeline.neighbors.neighbors import neighbors_stage
from pipeline.neighbors.refill import Refill, replaced
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.stage import Stage
from retrieval.errors import UserError
from retrieval.index.hidden import hidden_ids
from retrieval.storage.manifest import Manifest, read_manifest, write_manifest
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import STARTED_FILE


@dataclass(frozen=True)
class Removed:
    """What was removed from the neighbor tables."""

    held: tuple[str, ...] = ()
    """Fingerprints of tables with a removed image, and of the tables they were derived from, newest first."""
    free: tuple[str, ...] = ()
    """Fingerprints of tables without a removed image."""
    dropped: int = 0
    """Number of rows (training images) that were dropped."""
    refilled: int = 0
    """Number of rows with replaced neighbors."""


def refill_tables(stage: Stage) -> Removed:
    """Remove the hidden ids of the training database from finished neighbor tables.

    Of unfinished ones `make neighbors` removes them.
    """
    root, saved = stage.root, f"{stage.name}/before"
    if root.exists(f"{saved}/manifest.json"):
        target = _current_stage(root, saved).fingerprint
        if read_manifest(root, saved).upstream["now"] != target:
            root.delete(saved)  # more ids were hidden since, so its new tables are outdated
    if not root.exists(f"{saved}/manifest.json"):
        if not root.exists("neighbors/manifest.json"):
            return Removed()
        before = read_manifest(root, "neighbors")
        now = _current_stage(root, "neighbors")
        if before.fingerprint == now.fingerprint:
            return Removed(free=(before.files_fingerprint,))
        if _inputs_without_hidden(before) != _inputs_without_hidden(now):
            raise UserError(
                f"{root.at('neighbors')} was made from another index. The images are hidden in the databases."
                " Run 'make neighbors', then this command again."
            )
        copy = replace(before, upstream={"now": now.fingerprint})
        write_manifest(root, copy, saved)
    before = read_manifest(root, saved)
    hidden, now = hidden_ids(root.child("index")), _current_stage(root, saved)
    if before.upstream["now"] != now.fingerprint:
        raise UserError(f"{root.at('index')}: more images were hidden while this command began. Run it again.")
    config = NeighborsConfig.model_validate(before.config)
    return _replace_tables(Refill(stage, config, f"{stage.name}/neighbors", hidden), before, now)


def _current_stage(root: Root, folder: str) -> Stage:
    """The neighbors stage with the settings of a stored manifest and the ids that are hidden now."""
    return neighbors_stage(NeighborsConfig.model_validate(read_manifest(root, folder).config), root)


def _inputs_without_hidden(tables: Manifest | Stage) -> tuple[int, dict[str, str]]:
    """Format version and inputs of neighbor tables, without the hidden ids."""
    upstream = {stage: identity for stage, identity in tables.upstream.items() if stage != "hidden"}
    return tables.schema_version, upstream


def _replace_tables(refill: Refill, before: Manifest, now: Stage) -> Removed:
    """Replace the old tables when all new ones are written, the manifest last.

    before: the manifest of the old ones. now: the stage with the hidden ids that are removed.
    """
    root = refill.stage.root
    new = refill.write(before.shard_names())
    root.delete("neighbors/manifest.json")
    shards = tuple(replace(replaced(old, new.get(old.shard)), inputs=now.inputs_of(old.shard)) for old in before.shards)
    root.write_json(f"neighbors/{STARTED_FILE}", asdict(now.identity))
    refill.apply(now.identity.shard_fingerprint, shards, new)
    made_of = (before.files_fingerprint, *before.values.get("made_of", ()))
    # A training on unchanged tables goes on, so these keep their fingerprint.
    changes = {"made_of": list(made_of)} if new else {"files_fingerprint": before.files_fingerprint}
    values = {word: value for word, value in before.values.items() if word != "files_fingerprint"} | changes
    write_manifest(
        root, replace(before, fingerprint=now.fingerprint, upstream=now.upstream, shards=shards, values=values)
    )
    if not new:
        return Removed(free=(before.files_fingerprint,))
    counts = [int(sum(record.values[word] for record in new.values())) for word in ("dropped", "refilled")]
    return Removed(made_of, (now.fingerprint,), *counts)


def with_earlier(removed: Removed, earlier: Removed) -> Removed:
    """The removal of this run, or of the earlier one if this run removed nothing; fingerprints of both.

    A training run that read the earlier tables may have written its first checkpoint since.
    """
    return replace(
        removed if removed.held else earlier,
        held=tuple(dict.fromkeys((*removed.held, *earlier.held))),
        free=tuple(dict.fromkeys((*removed.free, *earlier.free))),
    )
