"""Inputs of finished stages that are no stages: metadata, blocklists, heads, CLIP model, precision, hidden ids, effort.

They are compared as the stages do, without reading data. The weights of CLIP are compared by their files, if these are
here: only loading them gives the digest that the stage compares.
"""

from collections.abc import Callable, Iterator

from jobs.cli.recipe import Recipe
from pipeline.filter.blocked_ids import with_later_blocked
from pipeline.filter.metadata import changed_metadata
from pipeline.neighbors.stored_effort import changed_effort
from pipeline.recipe import DownloadConfig, EmbedConfig, FilterConfig, NeighborsConfig
from pipeline.web.blocklist import read_blocklist
from retrieval.clip.head_files import head_digest, heads_identity, read_head
from retrieval.clip.weight_files import weights_changed
from retrieval.index.hidden import hidden_digest
from retrieval.recipe import ClipConfig, Precision
from retrieval.storage.manifest import Manifest, read_manifest
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import LatentsConfig

OTHER_BLOCKLIST = "made with another blocklist"


def changed_inputs(recipe: Recipe, name: str, made: Manifest) -> str:
    """Which of these inputs differ from those that a stage was made from, in words; "" if none.

    Raises UserError for an input that cannot be read.
    """
    changes = CHANGES.get(name)
    return "; ".join(changes(recipe, made)) if changes else ""


def _of_filter(recipe: Recipe, made: Manifest) -> Iterator[str]:
    config = recipe[FilterConfig]
    if changes := changed_metadata(config, recipe.root, made):
        yield f"made from other metadata: {changes}"
    if read_blocklist(config.blocklist).identity != made.inputs.get("blocklist", ""):
        yield OTHER_BLOCKLIST


def _of_download(recipe: Recipe, made: Manifest) -> Iterator[str]:
    if "filter" not in made.upstream:  # `import` made it
        return
    blocklist = read_blocklist(recipe[DownloadConfig].blocklist, "download.blocklist")
    if recipe.root.exists("filter/manifest.json"):
        blocklist = with_later_blocked(blocklist, recipe.root, read_manifest(recipe.root, "filter"))
    if blocklist.identity != made.inputs.get("blocklist", ""):
        yield OTHER_BLOCKLIST


def _of_embed(recipe: Recipe, made: Manifest) -> Iterator[str]:
    heads = recipe[EmbedConfig].heads
    digests = {name: head_digest(name, head, read_head(name, head)) for name, head in heads.items()}
    if heads_identity(digests, heads) != made.inputs.get("heads", ""):
        yield "made with other heads"
    model = made.values.get("encoder", {}).get("model")
    if model and recipe.has("clip"):
        if model != recipe[ClipConfig].model.rsplit("/", maxsplit=1)[-1]:
            yield f"made with the CLIP model {model}"
        elif weights_changed(recipe[ClipConfig], made.values.get("clip_files", {})):
            yield "made with other weights of CLIP"
    yield from _of_precision(recipe[EmbedConfig].used_precision, made)


def _of_latents(recipe: Recipe, made: Manifest) -> Iterator[str]:
    yield from _of_precision(recipe[AutoencoderConfig].precision(recipe[LatentsConfig].device), made)


def _of_precision(precision: Precision, made: Manifest) -> Iterator[str]:
    former = made.upstream.get("precision", "")
    if precision == (former or "fp32"):
        return
    if not former and made.config.get("gpus_per_worker"):  # with the same settings GPUs compute in bf16 now
        yield "made by an earlier version, which did not record the precision"
    else:
        yield f"made in {former or 'fp32'}, not {precision}"


def _of_neighbors(recipe: Recipe, made: Manifest) -> Iterator[str]:
    if hidden_digest(recipe.root.child("index")) != made.upstream.get("hidden", ""):
        yield "made with other hidden images"
    if change := changed_effort(recipe[NeighborsConfig], recipe.root, made):
        yield change


CHANGES: dict[str, Callable[[Recipe, Manifest], Iterator[str]]] = {
    "filter": _of_filter,
    "download": _of_download,
    "embed": _of_embed,
    "latents": _of_latents,
    "neighbors": _of_neighbors,
}
