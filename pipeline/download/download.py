"""Downloads the selected images. One shard is one task.

Reads `filter/{train,database}/<shard>.parquet`; writes `download/{train,database}/<shard>.tar` and `.parquet` with
one status row for each URL. Large images are reduced (`train_edge`, `database_edge`). Updated shards get other
file names (`shard_update`): their records name them.
"""

import logging
import time
import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.download.former_shards import delete_former, set_aside
from pipeline.filter.blocked_ids import with_later_blocked
from pipeline.recipe import SHARDS_AT_ONCE, DownloadConfig
from pipeline.runtime.id_files import erased_ids
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers, shared_function
from pipeline.web.blocklist import Blocklist, read_blocklist
from pipeline.web.fetch import Fetcher, FetchSettings
from pipeline.web.host_leases import Renew, make_renew
from pipeline.web.host_queue import HostLimits
from retrieval.config import WorkersConfig
from retrieval.storage.manifest import Manifest, read_manifest
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import setting_differences

if TYPE_CHECKING:
    from pipeline.download.image_download import SplitSettings

SCHEMA_VERSION = 3


def run(config: DownloadConfig, root: Root, retry: bool = False) -> Manifest:
    """Run the stage unless it is finished. Raises UserError if filter did not finish or the network is down.

    A changed blocklist or filter is applied to finished shards; pictures that stay selected are kept. retry: request
    the URLs of finished shards again that failed for a transient reason or are no longer blocked.
    """
    started = time.time()
    selected = read_manifest(root, "filter")
    listed = replace(read_blocklist(config.blocklist, "download.blocklist"), erased=erased_ids(root))
    blocklist = with_later_blocked(listed, root, selected)
    inputs = {"blocklist": blocklist.identity}
    shards = [*selected.shard_names("train/"), *selected.shard_names("database/")]
    digests = selected.digests()
    by_shard = {shard: {"filter": digests[shard]} for shard in shards}
    upstream, keep_former = {"filter": selected.identity}, partial(set_aside, root)
    stage = Stage(root, "download", SCHEMA_VERSION, config, upstream, inputs, by_shard, keep_former)
    if (finished := stage.finished()) and not retry:
        _log_changed_settings(stage, finished)
        return finished
    make_leases = partial(make_renew, config.max_host_connections)
    with stage.building(), shared_function(make_leases) as renew:
        make = partial(make_work, config, root, blocklist, retry, renew)
        # While one shard is written, or waits for its last servers, the other is fetched.
        workers = replace(Workers.from_config(config), shards_at_once=SHARDS_AT_ONCE)
        records = run_shards(stage, shards, make, workers, include_finished=retry)
        delete_former(root, records)
        urls = int(sum(record.values["urls"] for record in records))
        blurred = int(sum(record.values.get("with_blurred_faces", 0) for record in records))
        values = {"urls": urls} | ({"with_blurred_faces": blurred} if blurred else {})
        return stage.complete(records, values, started)


def _log_changed_settings(stage: Stage, finished: Manifest) -> None:
    """Log which settings of a finished download would fetch other images now. They are not fetched again."""
    workers = WorkersConfig.model_fields.keys()
    now = {name: value for name, value in stage.config.model_dump(mode="json").items() if name not in workers}
    # Settings that are newer than the download had their default.
    defaults = {name: field.default for name, field in DownloadConfig.model_fields.items()}
    if differences := setting_differences(defaults | finished.config, now):
        stage.log.info("made %s: this applies to new requests only", "; ".join(differences))


def make_work(
    config: DownloadConfig, root: Root, blocklist: Blocklist, retry: bool = False, renew: Renew | None = None
) -> Work:
    """The function that a worker process calls with the name of each shard."""
    from pipeline.download.shard_download import ShardDownload
    from pipeline.download.shard_update import ShardUpdate

    # Damaged pictures are reported in the status of their URL; Pillow's warnings add nothing.
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    work = ShardDownload(root, Fetcher(_fetch_settings(config)), split_settings(config, blocklist), renew)
    return ShardUpdate(work, retry)


def _fetch_settings(config: DownloadConfig) -> FetchSettings:
    connections = min(config.host_connections, config.max_host_connections)
    return FetchSettings(
        user_agent=config.user_agent,
        contact=config.contact,
        access=config.allow_private,
        timeout_s=config.timeout_s,
        deadline_s=config.deadline_s,
        retries=config.retries,
        max_bytes=config.max_bytes,
        connections=SHARDS_AT_ONCE * config.threads,
        host_limits=HostLimits(connections, config.host_pause_s, config.host_max_wait_s),
        robots=config.robots,
        ports=frozenset(config.ports),
    )


def split_settings(config: DownloadConfig, blocklist: Blocklist) -> "dict[str, SplitSettings]":
    """How the images of each split are stored."""
    from pipeline.download.image_download import SplitSettings

    edges = {
        "train": (config.train_edge, config.train_min_edge),
        "database": (config.database_edge, config.database_min_edge),
    }
    return {
        split: SplitSettings(
            edge=edge,
            min_edge=min_edge,
            max_pixels=config.max_pixels,
            image_format=config.image_format,
            quality=config.jpeg_quality if config.image_format == "jpeg" else config.webp_quality,
            threads=config.threads,
            min_answered=config.min_answered,
            max_aspect_ratio=config.max_aspect_ratio,
            blocklist=blocklist,
        )
        for split, (edge, min_edge) in edges.items()
    }
