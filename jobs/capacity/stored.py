"""Rates and sizes of the capacity plan from the manifests of a run, such as a pilot on a part of the metadata.

Reads the manifests of the finished stages below a root. What they do not state stays as in the inputs.
"""

from pipeline.capacity import MEASURED_DIM, MICROSECOND, PUBLISHED_EDGE, Inputs, Rate
from pipeline.recipe import SHARDS_AT_ONCE
from pipeline.runtime.status import find_manifest
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root
from retrieval.storage.schema import SPLITS, Reason


def stored_inputs(inputs: Inputs, root: Root) -> Inputs:
    """The inputs with the rates and the share of database images of the finished stages below a root."""
    filtered, downloaded, index = (find_manifest(root, stage) for stage in ("filter", "download", "index"))
    sizes, values = inputs.sizes, {}
    if filtered and filtered.rows:
        values["text"] = filtered.bytes / filtered.rows, f"{root.at('filter')}, {filtered.rows:,} rows"
    if downloaded:
        for split in SPLITS:
            values |= _of_download(downloaded, split, root.at("download"))
    if index and index.rows:
        dim = index.values["encoder"]["dim"]
        text = values["text"][0] if "text" in values else inputs.rate("text")
        per_row = (index.bytes / index.rows - text) * MEASURED_DIM / dim
        values["index_bytes"] = per_row, f"{root.at('index')}, {index.rows:,} rows of {dim}"
    if filtered and downloaded:
        rows = sum(shard.rows for shard in downloaded.shards if shard.shard.startswith("database/"))
        read = filtered.rows + sum(filtered.reasons.values()) - filtered.reasons.get(Reason.NOT_SAMPLED, 0)
        source = f"measured: {root.at('download')}, {rows:,} of {read:,} rows"
        share = {"database_images": max(1, round(sizes.metadata_rows * rows / read)), "database_source": source}
        sizes = sizes.model_copy(update=share)
    rates = {
        name: Rate(value=value, unit=inputs.rates[name].unit, source=f"measured: {source}")
        for name, (value, source) in values.items()
        if value > 0
    }
    return inputs.model_copy(update={"rates": inputs.rates | rates, "sizes": sizes})


def _of_download(manifest: Manifest, split: str, folder: str) -> dict[str, tuple[float, str]]:
    """Bytes of an image, and worker time of a URL, with their sources. A worker has a CPU and SHARDS_AT_ONCE shards."""
    shards = [shard for shard in manifest.shards if shard.shard.startswith(f"{split}/")]
    images = sum(shard.rows for shard in shards)
    urls = images + sum(sum(shard.reasons.values()) for shard in shards)
    if not images:
        return {}
    size = sum(file.bytes for shard in shards for file in shard.files if file.name.endswith(".tar")) / images
    if split == "database":  # the rate is that of images of PUBLISHED_EDGE
        size *= (PUBLISHED_EDGE / manifest.config["database_edge"]) ** 2
    cpu_us = sum(shard.seconds for shard in shards) / SHARDS_AT_ONCE / urls / MICROSECOND
    return {
        f"image_{split}": (size, f"{folder}, {images:,} images"),
        f"fetch_cpu_{split}": (cpu_us, f"{folder}, time of workers of one CPU for {urls:,} URLs"),
    }
