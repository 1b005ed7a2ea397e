"""The GPUs of a training run on Ray: asks for them, and waits while the cluster starts nodes that have them.

Ray Train itself waits without a limit, and on a cluster without GPUs it would train on CPUs. After the wait another job
may take the GPUs, so that Ray Train gets a limit too.
"""

import logging
import os
import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from retrieval.errors import UserError
from trainer.recipe import TrainConfig

RESOURCE = "GPU"
"""Ray's name of what a rank needs."""
LOG_S = 60.0
"""Seconds between two lines of the log while the number of GPUs does not change."""
RELEASE_S = 60
"""Wait at least this long for GPUs that are there: processes of a failed attempt may not have ended."""
STARTS = 2
"""Attempts of Ray Train to start the ranks: a node may be lost during one."""
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"

log = logging.getLogger("train")


def num_gpus() -> int:
    """GPUs of the cluster now, also those in use; call it inside `ray_connection`, as all functions here."""
    return int(ray.cluster_resources().get(RESOURCE, 0))


def ranks_on_ray(config: TrainConfig) -> int:
    """Ranks to start: `ranks`, or one for each GPU that is there, at least one."""
    return config.ranks or max(1, num_gpus())


def uses_gpus(config: TrainConfig) -> bool:
    """True if ranks run on GPUs: the cluster has some, or nodes may join it for which the recipe waits."""
    return num_gpus() > 0 or (config.ranks > 0 and config.wait_for_gpus_s > 0 and _may_grow())


def wait_for_gpus(ranks: int, limit_s: int) -> None:
    """Ask Ray for a GPU for each rank and wait until they are free. Raises UserError after `limit_s` seconds,
    for GPUs that are there but in use after at least RELEASE_S. They are not reserved: another job may take them.

    Raises it at once if there are fewer and Ray runs on this machine alone.
    """
    if num_gpus() >= ranks:
        limit_s = max(limit_s, RELEASE_S)
    elif not _may_grow():
        limit_s = 0
    deadline = time.monotonic() + limit_s
    # An autoscaler adds nodes for a placement group that waits, and keeps those that wait for the others.
    group = placement_group([{RESOURCE: 1}] * ranks)
    logged, log_at = "", 0.0
    try:
        while not group.wait(1):
            now, found = time.monotonic(), resources_found(RESOURCE)
            if now >= deadline:
                raise UserError(
                    f"GPUs of the Ray cluster {ray.get_runtime_context().gcs_address}: {found}, after {limit_s:,} s. "
                    f"Wanted: {ranks} free ones, one for each rank. Start nodes with GPUs, let the autoscaler start "
                    "more of them (maxReplicas of a KubeRay group), lower train.ranks, or raise train.wait_for_gpus_s."
                )
            if found != logged or now >= log_at:
                log.info(f"waiting for {ranks} GPUs: {found}; Ray was asked for nodes, {deadline - now:,.0f} s left")
                logged, log_at = found, now + LOG_S
    finally:
        remove_placement_group(group)


def limit_start(config: TrainConfig) -> int:
    """Let Ray Train wait for the resources of the ranks as long as `wait_for_gpus` waits for GPUs of new nodes.

    Returns the seconds, at least RELEASE_S, which are divided among STARTS attempts.
    """
    limit_s = max(config.wait_for_gpus_s if _may_grow() else 0, RELEASE_S)
    os.environ[START_TIMEOUT] = str(limit_s / STARTS)
    return limit_s


def resources_found(resource: str) -> str:
    """How many of a resource, such as RESOURCE, the cluster has, and how many of them are free."""
    there, free = (
        int(resources.get(resource, 0)) for resources in (ray.cluster_resources(), ray.available_resources())
    )
    return f"{there} there, {free} of them free"


def _may_grow() -> bool:
    """True if Ray is a cluster that nodes can join, not one that was started for this command."""
    return (os.environ.get("RAY_ADDRESS") or "local") != "local"
