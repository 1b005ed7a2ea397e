"""`python -m jobs.latents RECIPE`: encodes the training images with the autoencoder, once for all epochs."""

from jobs.command import main
from jobs.recipe import Recipe
from pipeline.runner import Stage, Workers, cluster, run_shards
