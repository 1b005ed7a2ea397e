"""Fetches the selected images from the servers that have them.

Reads `filter/{train,database}/<shard>.parquet`; writes `download/{train,database}/<shard>.tar` and
`.parquet`, one row of status for each URL. Training images keep their size, database images are cut down.
One shard is one task; `fetch` and `picture` say how a URL is treated, `shard_download` how a shard is.
"""

import logging
import os
import time
import warnings
from functools import partial
from typing import Literal

from pydantic import Field

from pipeline.fetch import Fetcher, Manners
from pipeline.runner import Stage, Work, Workers, run_shards
from retrieval.config import Config, speed
from retrieval.manifest import Manifest, read_manifest
from retrieval.storage import Root

SCHEMA_VERSION = 1


class DownloadConfig(Config):
    """How images are fetched and stored."""

    contact: str = speed(..., pattern=r"^[!-~]+$")
    """Where the owner of a server can complain: a URL or mail address, sent with every request."""
    user_agent: str = Field("laion-rdm", pattern=r"^[A-Za-z0-9._-]+$")
    """The name that servers see, and by which X-Robots-Tag may forbid us an image."""
    allow_private: Literal["none", "loopback", "all"] = "none"
    """Addresses beside public ones: none, this machine alone, or private networks too."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest wait for a server's next sign of life, in seconds."""
    deadline_s: float = Field(60.0, gt=0)
    """Longest time for one URL with its redirects and retries, in seconds."""
    retries: int = Field(2, ge=0)
    """Further attempts after a 429, a 5xx or a broken connection."""
    max_bytes: int = Field(32 << 20, ge=1)
    """Largest body that is read, in bytes."""
    max_pixels: int = Field(80_000_000, ge=1, le=1 << 30)
    """Largest picture that is decoded: width x height."""
    train_min_edge: int = Field(768, ge=1)
    """Shorter edge in pixels that a training image must have once it is decoded."""
    database_edge: int = Field(224, ge=1)
    """Shorter edge in pixels to which larger database images are cut down, ratio kept."""
    database_min_edge: int = Field(32, ge=1)
    """Shorter edge in pixels of the least database image; servers send 1 x 1 for what they have not."""
    jpeg_quality: int = Field(95, ge=1, le=100)
    """Quality of pictures that are encoded anew; an upright RGB JPEG that keeps its size keeps its bytes."""
    min_success: float = speed(0.05, ge=0, le=1)
    """Share of a shard's URLs that must give an answer of any kind; with less the network counts as down."""
    threads: int = speed(32, ge=1)
    """URLs that one worker fetches at once."""
    workers: int = speed(0, ge=0)
    """Worker processes of one CPU each; 0: as many as the cluster has CPUs."""


def run(config: DownloadConfig, root: Root) -> Manifest:
    """Run the stage, or find it finished. Raises UserError if filter did not finish or nothing answers."""
    started = time.time()
    selected = read_manifest(root, "filter")
    stage = Stage(root, "download", SCHEMA_VERSION, config, {"filter": selected.fingerprint})
    if done := stage.finished():
        return done
    stage.begin()
    shards = [*selected.shard_names("train/"), *selected.shard_names("database/")]
    records = run_shards(stage, shards, partial(_make_work, config, root), Workers(config.workers))
    urls = int(sum(record.values["urls"] for record in records))
    return stage.complete(records, {"urls": urls}, started)


def _make_work(config: DownloadConfig, root: Root) -> Work:
    # img2dataset imports albumentations, which otherwise asks the network for a newer release.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from pipeline.shard_download import ShardDownload, Storing

    # What Pillow has to say of other people's files is in the status of each URL.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    manners = Manners(
        user_agent=config.user_agent,
        contact=config.contact,
        access=config.allow_private,
        timeout_s=config.timeout_s,
        deadline_s=config.deadline_s,
        retries=config.retries,
        max_bytes=config.max_bytes,
        connections=config.threads,
    )
    edges = {
        "train": (0, config.train_min_edge),
        "database": (config.database_edge, config.database_min_edge),
    }
    storing = {
        split: Storing(
            edge=edge,
            min_edge=min_edge,
            max_pixels=config.max_pixels,
            jpeg_quality=config.jpeg_quality,
            threads=config.threads,
            min_success=config.min_success,
        )
        for split, (edge, min_edge) in edges.items()
    }
    return ShardDownload(root, Fetcher(manners), storing)
