"""`laion-rdm latents RECIPE`: encodes the training images with the autoencoder, once for all epochs."""

import time
from functools import partial

from jobs.cli.command import stage_command
from jobs.cli.recipe import Recipe
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Workers
from retrieval.cluster.connection import ray_connection
from retrieval.storage import schema
from retrieval.storage.manifest import read_manifest
from trainer.data.latents import make_shard_encoder, manifest_values
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import LatentsConfig


def run(recipe: Recipe) -> None:
    """Run `trainer.data.latents`, which does not use Ray, in the workers of a Ray cluster."""
    started = time.time()
    config, autoencoder_config, root = recipe[LatentsConfig], recipe[AutoencoderConfig], recipe.root
    embed = read_manifest(root, "embed")
    autoencoder = Autoencoder.load(autoencoder_config, "cpu")
    upstream = {"embed": embed.identity_of("train/"), "autoencoder": autoencoder.identity}
    if autoencoder_config.precision(config.device) == "bf16":
        upstream["precision"] = "bf16"  # without it: fp32
    # The inputs of an embedded shard are the digests of its pictures.
    by_shard = {
        record.shard.removeprefix("train/"): record.inputs | {"embed": record.digest}
        for record in embed.shards
        if record.shard.startswith("train/")
    }
    stage = Stage(root, f"latents/{config.size}", schema.VERSION, config, upstream, by_shard=by_shard)
    if stage.finished():
        return
    with stage.building():
        shards = list(by_shard)
        make_work = partial(make_shard_encoder, config, autoencoder_config, root)
        workers = Workers.from_config(config, num_gpus=config.gpus_per_worker)
        with ray_connection():
            records = run_shards(stage, shards, make_work, workers)
        stage.complete(records, manifest_values(config, autoencoder), started)


main = stage_command("latents", __doc__, run)

if __name__ == "__main__":
    main()
