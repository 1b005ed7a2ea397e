"""Workers of a stage: their work and resources, how many fit the nodes of the Ray cluster, the idle ones, and functions
that all of them share."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.runtime import memory
from retrieval.config import ResourcesConfig
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord

Work = Callable[[str], ShardRecord]
"""Processes one shard: takes its name, writes its files, returns its record. Safe to repeat."""
ANSWER_S = 5.0
"""Longest wait for the answer of a shared function."""
NODE_SHARE = 0.001
"""Amount of the custom resource `nodes` that a worker takes: it selects nodes and does not limit workers."""


@dataclass(frozen=True)
class Workers:
    """The resources of one worker and the number of workers; count 0: as many as fit the nodes, also those that join.

    nodes: not for a Ray on this machine alone, which offers no such resource.
    shards_at_once: shards that a worker processes in threads, so that one is read or written while another is computed.
    """

    count: int = 0
    num_cpus: float = 1
    num_gpus: float = 0
    memory_gb: float = 0
    nodes: str = ""
    shards_at_once: int = 1

    @classmethod
    def from_config(
        cls, config: ResourcesConfig, count: int | None = None, num_cpus: float = 1, num_gpus: float = 0
    ) -> "Workers":
        """The workers of a stage or pass. count: replaces config.workers."""
        count = config.workers if count is None else count
        return cls(count, num_cpus, num_gpus, config.memory_gb, config.nodes)

    def num_wanted(self) -> int:
        """Workers to start: `count`, or as many as fit the nodes.

        On a cluster, `count` workers are started even if fewer fit, because an autoscaler adds nodes for workers that
        wait. Raises UserError if none fits and `count` is 0 or Ray runs on this machine alone.
        """
        fitting = self.num_fitting()
        if self.count and (fitting >= self.count or _is_cluster()):
            return self.count
        if not fitting:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            maxima = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in self._needs()}
            raise UserError(
                f"a worker takes {_format(self._needs())}; no node of the cluster has all of that, the most "
                f"are {_format(maxima)}. Lower it in the section of the recipe, such as [embed] or [optout], or set "
                "RAY_ADDRESS or CLUSTER. On a cluster that adds nodes on demand, set the section's 'workers': then the "
                "stage waits for nodes."
            )
        return fitting

    def num_fitting(self) -> int:
        """How many workers fit the nodes that are there now, at most `count` if that is set."""
        fitting = sum(self._fit(node["Resources"]) for node in ray.nodes() if node["Alive"])
        return min(self.count or fitting, fitting)

    def _needs(self) -> dict[str, float]:
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": self.memory_gb * memory.GB}
        return {kind: need for kind, need in {**needs, **self._node_share()}.items() if need}

    def _node_share(self) -> dict[str, float]:
        return {self.nodes: NODE_SHARE} if self.nodes and _is_cluster() else {}

    def _fit(self, node: dict[str, float]) -> int:
        return min(int(node.get(kind, 0) / need + 1e-6) for kind, need in self._needs().items())

    def options(self, sick_nodes: set[str]) -> dict[str, Any]:
        """The resources as Ray actor options. sick_nodes: ids of nodes that get no worker."""
        selector = {"ray.io/node-id": f"!in({','.join(sorted(sick_nodes))})"} if sick_nodes else None
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "memory": int(self.memory_gb * memory.GB) or None,
            "resources": self._node_share() or None,
            "label_selector": selector,
            "max_concurrency": self.shards_at_once,
            "max_restarts": 0,
        }


def _is_cluster() -> bool:
    return (os.environ.get("RAY_ADDRESS") or "local") != "local"


@dataclass
class _IdleWorkers:
    """Actors of a pass that the next pass may take. resources: the workers that they were started as."""

    resources: Workers | None = None
    actors: list[Any] = field(default_factory=list)

    def end(self) -> None:
        while self.actors:
            ray.kill(self.actors.pop())


_idle: ContextVar[_IdleWorkers | None] = ContextVar("idle", default=None)
"""None outside of `shared_workers`."""


@contextmanager
def shared_workers() -> Iterator[None]:
    """Within the block, a pass takes the idle workers of the pass before it, if it needs the same resources.

    Within another such block it changes nothing: stages that run one after another may share their workers.
    """
    if _idle.get() is not None:
        yield
        return
    idle = _IdleWorkers()
    token = _idle.set(idle)
    try:
        yield
    finally:
        idle.end()
        _idle.reset(token)


def take_idle(workers: Workers) -> Any | None:
    """An idle actor with these resources, or None. Actors with other resources are ended: they hold CPUs or GPUs."""
    idle = _idle.get()
    if idle is None:
        return None
    if idle.resources != replace(workers, count=0):
        idle.end()
    return idle.actors.pop() if idle.actors else None


def leave_idle(workers: Workers, actors: list[Any]) -> None:
    """Leave the idle actors of a pass to the next one. Outside of `shared_workers` they are ended."""
    idle = _idle.get() or _IdleWorkers()
    idle.resources = replace(workers, count=0)
    idle.actors += actors
    if _idle.get() is None:
        idle.end()


def hide_unassigned_gpus(assigned: list[int] | list[str]) -> None:
    """Hide all GPUs from CUDA in this process if Ray assigned none to it; Ray itself hides only those of others.

    Call it before CUDA starts. assigned: `ray.get_gpu_ids()`.
    """
    if not assigned:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class _FunctionActor:
    """A Ray actor with one function. make: makes the function; takes whether the actor was restarted."""

    def __init__(self, make: Callable[[bool], Callable[..., Any]]) -> None:
        with warnings.catch_warnings(action="ignore"):  # Ray uses a deprecated function of its own
            was_restarted = ray.get_runtime_context().was_current_actor_reconstructed
        hide_unassigned_gpus(ray.get_gpu_ids())
        self.function = make(was_restarted)

    def call(self, *arguments: Any) -> Any:
        return self.function(*arguments)


@dataclass(frozen=True)
class SharedFunction:
    """A function with memory that all workers of a stage call. Returns None if there is no answer in ANSWER_S."""

    actor: Any

    def __call__(self, *arguments: Any) -> Any:
        """Call the function. Raises its exceptions."""
        try:
            return ray.get(self.actor.call.remote(*arguments), timeout=ANSWER_S)
        except RayTaskError:
            raise
        except RayError:  # the actor was lost and is being restarted, or is busy
            return None


@contextmanager
def shared_function(make: Callable[[bool], Callable[..., Any]]) -> Iterator[SharedFunction | None]:
    """A function for all workers, until the block ends; None without Ray. Its actor is restarted when it is lost.

    make: makes the function; takes whether the actor was restarted.
    """
    actor = start_actor(make)
    try:
        yield SharedFunction(actor) if actor else None
    finally:
        if actor:
            ray.kill(actor)


def start_actor(make: Callable[[bool], Callable[..., Any]]) -> Any | None:
    """The actor of a shared function; None without Ray."""
    actor_class: Any = ray.remote(_FunctionActor)
    return actor_class.options(num_cpus=0, max_restarts=-1).remote(make) if ray.is_initialized() else None


def _format(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{kind} {count / memory.GB:.1f} GB" if kind == "memory" else f"{kind} {count:g}"
        for kind, count in resources.items()
    )
