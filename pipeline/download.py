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
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline.blocklist import Blocklist, read_blocklist
from pipeline.fetch import Fetcher, Manners
from pipeline.runner import Work, Workers, run_shards
from pipeline.stage import Stage
from pipeline.turns import Courtesy
from retrieval.config import WorkersConfig, speed
from retrieval.manifest import Manifest, read_manifest
from retrieval.storage import Root

if TYPE_CHECKING:
    from pipeline.seam import Storing

SCHEMA_VERSION = 2


class DownloadConfig(WorkersConfig):
    """How images are fetched and stored."""

    contact: str = speed(..., pattern=r"^[!-~]+$")
    """Where the owner of a server can complain: a URL or mail address, sent with every request."""
    user_agent: str = Field("laion-rdm", pattern=r"^[A-Za-z0-9._-]+$")
    """The name that servers see, and by which X-Robots-Tag may forbid us an image."""
    robots: bool = False
    """Whether each server's robots.txt is asked for and heeded; X-Robots-Tag always is."""
    allow_private: Literal["none", "loopback", "all"] = "none"
    """Addresses beside public ones: none, this machine alone, or private networks too."""
    timeout_s: float = Field(10.0, gt=0)
    """Longest wait for a server's next sign of life, in seconds."""
    deadline_s: float = Field(60.0, gt=0)
    """Longest time for one URL with its redirects and retries, in seconds."""
    retries: int = Field(2, ge=0)
    """Further attempts after a 429, 500, 502, 503, 504 or a broken connection."""
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
    blocklist: str = ""
    """Path or URL of a text file of what must not be used, as of filter; its hashes count here alone."""
    min_success: float = speed(0.05, ge=0, le=1)
    """Share of a shard's URLs that must give an answer of any kind; with less the network counts as down."""
    threads: int = speed(32, ge=1)
    """URLs that one worker fetches at once."""
    host_connections: int = speed(6, ge=1)
    """Most connections that one worker has to one host; further workers add theirs."""
    host_pause_s: float = speed(0.0, ge=0)
    """Least seconds between two requests of one worker to one host."""
    host_patience_s: float = speed(60.0, ge=0)
    """Seconds that a host may ask us to wait (429, 503) in one shard; then the rest of its URLs is left."""


def run(config: DownloadConfig, root: Root, retry: bool = False) -> Manifest:
    """Run the stage, or find it finished. Raises UserError if filter did not finish or nothing answers.

    retry: ask once more for the URLs of finished shards that failed for a passing reason.
    """
    started = time.time()
    selected = read_manifest(root, "filter")
    blocklist = read_blocklist(config.blocklist, "download.blocklist")
    made_from = {"filter": selected.fingerprint, "blocklist": blocklist.identity}
    stage = Stage(root, "download", SCHEMA_VERSION, config, made_from)
    if (done := stage.finished()) and not retry:
        return done
    stage.begin()
    shards = [*selected.shard_names("train/"), *selected.shard_names("database/")]
    make = partial(make_work, config, root, blocklist, retry)
    records = run_shards(stage, shards, make, Workers.of(config), finished_too=retry)
    urls = int(sum(record.values["urls"] for record in records))
    return stage.complete(records, {"urls": urls}, started)


def make_work(config: DownloadConfig, root: Root, blocklist: Blocklist, retry: bool = False) -> Work:
    """What one worker process does with a shard's name; loads img2dataset."""
    # img2dataset imports albumentations, which otherwise asks the network for a newer release.
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from pipeline.retry import ShardRetry
    from pipeline.shard_download import ShardDownload

    # What Pillow has to say of other people's files is in the status of each URL.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    work = ShardDownload(root, Fetcher(_manners(config)), _storing(config, blocklist))
    return ShardRetry(work) if retry else work


def _manners(config: DownloadConfig) -> Manners:
    return Manners(
        user_agent=config.user_agent,
        contact=config.contact,
        access=config.allow_private,
        timeout_s=config.timeout_s,
        deadline_s=config.deadline_s,
        retries=config.retries,
        max_bytes=config.max_bytes,
        connections=config.threads,
        courtesy=Courtesy(config.host_connections, config.host_pause_s, config.host_patience_s),
        robots=config.robots,
    )


def _storing(config: DownloadConfig, blocklist: Blocklist) -> "dict[str, Storing]":
    from pipeline.seam import Storing

    edges = {
        "train": (0, config.train_min_edge),
        "database": (config.database_edge, config.database_min_edge),
    }
    return {
        split: Storing(
            edge=edge,
            min_edge=min_edge,
            max_pixels=config.max_pixels,
            jpeg_quality=config.jpeg_quality,
            threads=config.threads,
            min_success=config.min_success,
            blocklist=blocklist,
        )
        for split, (edge, min_edge) in edges.items()
    }
