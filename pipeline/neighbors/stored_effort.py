"""The effort that the stage measured for `min_recall`: the partitions and the lists that each training image visits.

Reads `neighbors_effort/manifest.json`, which `effort.py` writes: the chosen numbers, their measured recall and, as the
input `embed`, the identity of the training images that they were measured on. The effort belongs to a database and to
settings. It stays if training images change: with other numbers all tables would be made again.
"""

from dataclasses import replace

from pipeline.recipe import NeighborsConfig
from pipeline.runtime.stage import Stage
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import stored_identity

FOLDER = "neighbors_effort"
SCHEMA_VERSION = 1


def effort_stage(config: NeighborsConfig, root: Root, inputs: dict[str, str]) -> Stage:
    """The measurement with these settings on the database at a root. inputs: identity of the training images.

    Only numbers are lost with an earlier one, so it is made again for another database or settings without --remake.
    """
    upstream = {"index": read_manifest(root, "index").identity}
    return Stage(root.remaking(), FOLDER, SCHEMA_VERSION, config, upstream, inputs)


def find_effort(config: NeighborsConfig, root: Root) -> NeighborsConfig | None:
    """The settings with the measured effort, None if it is not measured. Without `min_recall` they stay."""
    if not config.min_recall:
        return config
    stage, upstream = effort_stage(config, root, {}), stored_identity(root, FOLDER).get("upstream", {})
    # Earlier versions had the training images here: the effort stays, as it does if images change now.
    images = {name: upstream[name] for name in ("embed",) if name in upstream}
    manifest = replace(stage, upstream=stage.upstream | images).stored()
    if manifest is None:
        return None
    numbers = {name: int(manifest.values[name]) for name in ("partitions_per_query", "lists_per_partition")}
    return config.model_copy(update=numbers)


def stored_effort(config: NeighborsConfig, root: Root) -> NeighborsConfig:
    """As `find_effort`. Raises UserError if it is not measured."""
    effort = find_effort(config, root)
    if effort is None:
        raise UserError(
            f"{root.at(FOLDER)} has no effort that was measured with the settings of the neighbor tables on the present"
            " database. Run 'make neighbors', which measures it, then this command again."
        )
    return effort


def effort_name(effort: NeighborsConfig) -> str:
    """The effort as an input of the tables."""
    return f"{effort.partitions_per_query} partitions, {effort.lists_per_partition} lists"


def changed_effort(config: NeighborsConfig, root: Root, tables: Manifest) -> str:
    """How the stored effort differs from that of finished tables with these settings, in words; "" if it does not.

    Tables of another database are not compared.
    """
    if not config.min_recall or tables.upstream.get("index") != read_manifest(root, "index").identity:
        return ""
    effort, of_tables = find_effort(config, root), tables.upstream.get("effort")
    if effort is None:
        return f"{FOLDER} is missing: the effort is measured again, and tables of another one need --remake"
    if effort_name(effort) != of_tables:
        return f"made with {of_tables}, {FOLDER} has {effort_name(effort)}: all is made again with --remake"
    return ""
