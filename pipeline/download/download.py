"""Fetches the selected images from the servers that have them.

Reads `filter/{train,database}/<shard>.parquet`; writes `download/{train,database}/<shard>.tar` and
`.parquet`, one row of status for each URL. Training images keep their size, database images are cut down.
One shard is one task; `fetch` and `picture` say how a URL is treated, `shard_download` how a shard is.
"""

import logging
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING

from pipeline.recipe import DownloadConfig
from pipeline.runtime.runner import Work, Workers, run_shards
from pipeline.runtime.stage import Stage
from pipeline.web.blocklist import Blocklist, read_blocklist
from pipeline.web.fetch import Fetcher, Manners
from pipeline.web.host_queue import Courtesy
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root

if TYPE_CHECKING:
    from pipeline.download.img2dataset_adapter import Storing

SCHEMA_VERSION = 2


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
    records = run_shards(stage, shards, make, Workers.from_config(config), include_finished=retry)
    urls = int(sum(record.values["urls"] for record in records))
    return stage.complete(records, {"urls": urls}, started)


def make_work(config: DownloadConfig, root: Root, blocklist: Blocklist, retry: bool = False) -> Work:
    """What one worker process does with a shard's name; loads img2dataset's downloader."""
    from pipeline.download.retry import ShardRetry
    from pipeline.download.shard_download import ShardDownload

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
    from pipeline.download.img2dataset_adapter import Storing

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
