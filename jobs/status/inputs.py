"""Inputs of finished stages that are no stages: metadata, blocklists, heads, CLIP, precision, vectors, hidden ids, and
the settings of `make import`.

They are compared as the stages do, without reading data. The weights of CLIP are compared by their files, if these are
here: only loading them gives the digest that the stage compares.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jobs.cli.recipe import Recipe
from pipeline.filter.blocked_ids import with_later_blocked
from pipeline.filter.metadata import changed_metadata
from pipeline.neighbors.stored_effort import changed_effort
from pipeline.recipe import DownloadConfig, EmbedConfig, FilterConfig, ImportConfig, NeighborsConfig
from pipeline.runtime.status import all_again
from pipeline.web.blocklist import read_blocklist
from retrieval.clip.head_files import head_digest, heads_identity, read_head
from retrieval.clip.weight_files import weights_changed
from retrieval.imports.pieces import source_identity
from retrieval.imports.source import VectorsConfig
from retrieval.index.hidden import hidden_digest
from retrieval.recipe import ClipConfig, Precision
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.stage_folder import setting_differences
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import LatentsConfig
from trainer.sampling.request import database_folder
from trainer.sampling.resumable import HIDDEN_LIST, hidden_lists


class Change(NamedTuple):
    """How an input differs, in words, and whether all shards are made again because of it."""

    text: str
    is_of_all: bool = False


Changes = Iterator[Change]
OTHER_BLOCKLIST = Change("made with another blocklist")


def changed_inputs(recipe: Recipe, name: str, made: Manifest) -> str:
    """Which of these inputs differ from those that a stage was made from, in words; "" if none.

    Raises UserError for an input that cannot be read.
    """
    changes = [*CHANGES[name](recipe, made)] if name in CHANGES else []
    texts = [change.text for change in changes]
    return "; ".join([*texts, all_again(made)] if any(change.is_of_all for change in changes) else texts)


def _of_filter(recipe: Recipe, made: Manifest) -> Changes:
    config = recipe[FilterConfig]
    if changes := changed_metadata(config, recipe.root, made):
        yield Change(f"made from other metadata: {changes}", is_of_all=True)
    if read_blocklist(config.blocklist).identity != made.inputs.get("blocklist", ""):
        yield OTHER_BLOCKLIST


def _of_download(recipe: Recipe, made: Manifest) -> Changes:
    blocklist = read_blocklist(recipe[DownloadConfig].blocklist, "download.blocklist")
    # Without `filter` among its inputs, `import` made it.
    if "filter" in made.upstream and recipe.root.exists("filter/manifest.json"):
        blocklist = with_later_blocked(blocklist, recipe.root, read_manifest(recipe.root, "filter"))
    if "import" in made.upstream:
        former, *_ = json.loads(made.upstream["import"])
        division = recipe[ImportConfig] if recipe.has("import") else ImportConfig()
        if differences := setting_differences({"import": former}, {"import": division.model_dump(mode="json")}):
            yield Change(f"made {'; '.join(differences)}", is_of_all=True)
    if blocklist.identity != made.inputs.get("blocklist", ""):
        yield OTHER_BLOCKLIST


def _of_embed(recipe: Recipe, made: Manifest) -> Changes:
    heads = recipe[EmbedConfig].heads
    digests = {name: head_digest(name, head, read_head(name, head)) for name, head in heads.items()}
    if heads_identity(digests, heads) != made.inputs.get("heads", ""):
        yield Change("made with other heads")
    yield from _of_clip(recipe, made)
    yield from _of_precision(recipe[EmbedConfig].used_precision, made)


def _of_clip(recipe: Recipe, made: Manifest) -> Changes:
    if not recipe.has("clip"):
        return
    model = str(made.values.get("encoder", {}).get("model", ""))
    if model != recipe[ClipConfig].model.rsplit("/", maxsplit=1)[-1]:
        yield Change(f"made with the CLIP model {model}", is_of_all=True)
    elif weights_changed(recipe[ClipConfig], made.values.get("clip_files", {})):
        yield Change("made with other weights of CLIP", is_of_all=True)


def _of_latents(recipe: Recipe, made: Manifest) -> Changes:
    yield from _of_precision(recipe[AutoencoderConfig].precision(recipe[LatentsConfig].device), made)


def _of_precision(precision: Precision, made: Manifest) -> Changes:
    former = made.upstream.get("precision", "")
    if precision == (former or "fp32"):
        return
    if not former and made.config.get("gpus_per_worker"):  # with the same settings GPUs compute in bf16 now
        yield Change("made by an earlier version, which did not record the precision", is_of_all=True)
    else:
        yield Change(f"made in {former or 'fp32'}, not {precision}", is_of_all=True)


def _of_index(recipe: Recipe, made: Manifest) -> Changes:
    former = made.upstream.get("vectors", "")
    if not recipe.has("vectors"):
        if former:
            yield Change("made from vectors of another tool, the recipe has no [vectors]", is_of_all=True)
    elif not former:
        yield Change("made from embed, the recipe has [vectors]", is_of_all=True)
    elif source_identity(recipe[VectorsConfig].vector_source()) != former:
        yield Change("made from other vectors", is_of_all=True)
    else:
        yield from _of_clip(recipe, made)


def _of_neighbors(recipe: Recipe, made: Manifest) -> Changes:
    if hidden_digest(recipe.root.child("index")) != made.upstream.get("hidden", ""):
        yield Change("made with other hidden images")
    if change := changed_effort(recipe[NeighborsConfig], recipe.root, made):
        yield Change(change)


def _of_samples(recipe: Recipe, made: Manifest) -> Changes:
    names = [name.removeprefix("database/") for name in made.upstream if name.startswith("database/")]
    hidden = hidden_lists(recipe.root, map(database_folder, names))
    if hidden != {name: digest for name, digest in made.upstream.items() if name.startswith(HIDDEN_LIST)}:
        yield Change("made with other hidden images")


CHANGES: dict[str, Callable[[Recipe, Manifest], Changes]] = {
    "filter": _of_filter,
    "download": _of_download,
    "embed": _of_embed,
    "index": _of_index,
    "latents": _of_latents,
    "neighbors": _of_neighbors,
    "sample": _of_samples,
    "evaluate": _of_samples,
}
