"""`python -m jobs.latents RECIPE`: encodes the training images with the autoencoder, once for all epochs."""

import time
from functools import partial

from jobs.cli.command import main
from jobs.cli.recipe import Recipe
from pipeline.runtime.runner import Workers, run_shards
from pipeline.runtime.stage import Stage
from retrieval.cluster.connection import connected
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from trainer.data.latents import make_shard_encoder, manifest_values
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import AutoencoderConfig, LatentsConfig


def run(recipe: Recipe) -> None:
    """Run the stage on a Ray cluster: this wires `trainer.data.latents`, which knows no Ray, to the runner."""
    started = time.time()
    config, settings, root = recipe[LatentsConfig], recipe[AutoencoderConfig], recipe.root
    embed = read_manifest(root, "embed")
    autoencoder = Autoencoder.load(settings, "cpu")
    made_from = {"embed": embed.identity, "autoencoder": autoencoder.identity}
    stage = Stage(root, f"latents/{config.size}", schema.VERSION, config, made_from)
    if stage.finished():
        return
    stage.begin()
    shards = [shard.removeprefix("train/") for shard in embed.shard_names("train/")]
    make_work = partial(make_shard_encoder, config, settings, root)
    workers = Workers.of(config, num_gpus=config.gpus_per_worker)
    with connected():
        records = run_shards(stage, shards, make_work, workers)
    stage.complete(records, manifest_values(config, autoencoder), started)


if __name__ == "__main__":
    main("latents", __doc__, run)
