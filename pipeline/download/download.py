"""Downloads the selected images. One shard is one task.

Reads `filter/{train,database}/<shard>.parquet`; writes `download/{train,database}/<shard>.tar` and `.parquet` with
one status row for each URL. Training images keep their size; database images are reduced.
"""

import logging
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING

from pipeline.recipe import DownloadConfig
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers
from pipeline.web.blocklist import Blocklist, read_blocklist
from pipeline.web.fetch import Fetcher, FetchSettings
from pipeline.web.host_queue import HostLimits
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root

if TYPE_CHECKING:
    from pipeline.download.image_download import SplitSettings

SCHEMA_VERSION = 2


def run(config: DownloadConfig, root: Root, retry: bool = False) -> Manifest:
    """Run the stage unless it is finished. Raises UserError if filter did not finish or the network is down.

    retry: request the URLs of finished shards again that failed for a transient reason.
    """
    started = time.time()
    selected = read_manifest(root, "filter")
    blocklist = read_blocklist(config.blocklist, "download.blocklist")
    made_from = {"filter": selected.fingerprint, "blocklist": blocklist.identity}
    stage = Stage(root, "download", SCHEMA_VERSION, config, made_from)
    if (finished := stage.finished()) and not retry:
        return finished
    with stage.building():
        shards = [*selected.shard_names("train/"), *selected.shard_names("database/")]
        make = partial(make_work, config, root, blocklist, retry)
        records = run_shards(stage, shards, make, Workers.from_config(config), include_finished=retry)
        urls = int(sum(record.values["urls"] for record in records))
        return stage.complete(records, {"urls": urls}, started)


def make_work(config: DownloadConfig, root: Root, blocklist: Blocklist, retry: bool = False) -> Work:
    """The function that a worker process calls with the name of each shard."""
    from pipeline.download.retry_failed import ShardRetry
    from pipeline.download.shard_download import ShardDownload

    # Damaged pictures are reported in the status of their URL; Pillow's warnings add nothing.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    work = ShardDownload(root, Fetcher(_fetch_settings(config)), _split_settings(config, blocklist))
    return ShardRetry(work) if retry else work


def _fetch_settings(config: DownloadConfig) -> FetchSettings:
    return FetchSettings(
        user_agent=config.user_agent,
        contact=config.contact,
        access=config.allow_private,
        timeout_s=config.timeout_s,
        deadline_s=config.deadline_s,
        retries=config.retries,
        max_bytes=config.max_bytes,
        connections=config.threads,
        host_limits=HostLimits(config.host_connections, config.host_pause_s, config.host_max_wait_s),
        robots=config.robots,
        ports=frozenset(config.ports),
    )


def _split_settings(config: DownloadConfig, blocklist: Blocklist) -> "dict[str, SplitSettings]":
    from pipeline.download.image_download import SplitSettings

    edges = {"train": (0, config.train_min_edge), "database": (config.database_edge, config.database_min_edge)}
    return {
        split: SplitSettings(
            edge=edge,
            min_edge=min_edge,
            max_pixels=config.max_pixels,
            jpeg_quality=config.jpeg_quality,
            threads=config.threads,
            min_answered=config.min_answered,
            blocklist=blocklist,
        )
        for split, (edge, min_edge) in edges.items()
    }
