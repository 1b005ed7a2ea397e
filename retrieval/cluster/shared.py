"""A `Cluster` with a name, which every driver of the same Ray cluster can search.

A detached actor holds the cluster, so the driver that starts it may end. If the actor's process ends, Ray restarts it,
and the actor opens the database again; if that fails, the cluster stays stopped. Searches run in threads, so the
queries of several drivers are answered at the same time.
"""

import time
from contextlib import ExitStack
from typing import Any, Self, Unpack

import numpy.typing as npt
import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from retrieval.cluster.cluster import Cluster, SearchOptions
from retrieval.errors import UserError
from retrieval.storage.root import Root

NAMESPACE = "laion-rdm"
"""Of Ray, for the names of shared clusters."""
SEARCHES_AT_ONCE = 32
STOP_TIMEOUT_S = 30.0


class _Host:
    """The class of the actor that holds the cluster. It computes little: it routes the queries and merges results."""

    def __init__(self, root: Root, settings: dict[str, Any]) -> None:
        self._cluster = Cluster.open(root, **settings)

    def rows(self) -> int:
        """Number of rows that a search can return. The first call returns once the cluster answers."""
        return len(self._cluster.database)

    def search(self, queries: npt.ArrayLike, k: int, options: SearchOptions) -> pa.Table:
        """`Cluster.search`."""
        return self._cluster.search(queries, k, **options)


class SharedCluster:
    """A cluster that other drivers find by its name. Safe to share between threads.

    It searches the database as it was when the cluster started: images that are hidden or erased later stay in its
    results until it is stopped and started again.
    """

    def __init__(self, name: str, host: Any) -> None:
        """host: the actor."""
        self.name = name
        self._host = host

    @classmethod
    def start(cls, name: str, folder: str, **settings: Any) -> Self:
        """Start the actors of a database. They run until `stop`, also after this driver.

        folder: every node must be able to open it. settings: fields of ClusterConfig. Needs a connection to Ray, see
        `ray_connection`. Raises UserError for an empty name, one that is taken, and what `Cluster.open` refuses.
        """
        _require_connection()
        if not name:
            raise UserError("the name of a shared cluster is empty; expected at least one character.")
        actor = ray.remote(_Host).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=SEARCHES_AT_ONCE,
        )
        try:
            shared = cls(name, actor.remote(Root(folder), settings))
        except ValueError as error:
            raise UserError(
                f"a cluster {name!r} runs already. Connect to it, stop it, or choose another name."
            ) from error
        with ExitStack() as stack:
            stack.callback(shared.stop)  # also after Ctrl-C
            try:
                ray.get(shared._host.rows.remote())
            except RayError as error:
                raise UserError(f"the cluster {name!r} of {folder} did not start: {_last_line(error)}") from error
            stack.pop_all()
        return shared

    @classmethod
    def connect(cls, name: str) -> Self:
        """The running cluster of this name. Raises UserError, with the names that run, if there is none."""
        _require_connection()
        try:
            return cls(name, ray.get_actor(name, NAMESPACE))
        except ValueError as error:
            raise UserError(f"no cluster {name!r} runs on this Ray; these run: {_running()}") from error

    def search(self, queries: npt.ArrayLike, k: int, **options: Unpack[SearchOptions]) -> pa.Table:
        """`Cluster.search`, with its arguments and errors. Warnings stay in the log of the actor."""
        return self._get(self._host.search.remote(queries, k, options))

    def __len__(self) -> int:
        """Number of rows of the database."""
        return int(self._get(self._host.rows.remote()))

    def stop(self) -> None:
        """Stop all actors, for all drivers. Returns when the name is free.

        Raises UserError if it is not within STOP_TIMEOUT_S.
        """
        ray.kill(self._host)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self.name in _names():
            if time.monotonic() > deadline:
                raise UserError(
                    f"the cluster {self.name!r} still runs {STOP_TIMEOUT_S:.0f} s after its stop. Try again."
                )
            time.sleep(0.05)

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except RayActorError as error:
            raise UserError(
                f"the cluster {self.name!r} does not run: {_last_line(error)}. It was stopped, or it is being "
                "restarted: connect again."
            ) from error


def _require_connection() -> None:
    if not ray.is_initialized():
        raise UserError("there is no connection to Ray. Use a block `with ray_connection():`.")


def _names() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(each["name"] for each in actors if each["namespace"] == NAMESPACE)


def _running() -> str:
    return ", ".join(_names()) or "none"


def _last_line(error: RayError) -> str:
    return str(error).strip().splitlines()[-1]
