"""Ray actors that hold the same and answer in turn; a lost one is replaced while the others answer.

Starts, asks and ends the actors of one share; what they hold and answer is the business of
`retrieval.cluster.cluster`.
"""

import itertools
import logging
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from retrieval.errors import UserError

LOG = logging.getLogger("cluster")

LOST_ACTOR = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)

MAX_LOSSES = 5
"""How many actors one block of queries may lose before it is held to be the cause."""
PAUSE_S = 0.5
"""Seconds between two starts of an actor that fails to come up."""
POLL_S = 0.02
"""Seconds between two looks at actors that are coming up, while none is up."""


@dataclass(frozen=True)
class Flight:
    """A question under way: the actor asked, the reference of its answer, and the arguments."""

    actor: Any
    answer: Any
    question: tuple[Any, ...]


@dataclass(frozen=True)
class _Coming:
    """An actor that is not up yet: when it was started, and its first answer."""

    started: float
    status: Any


class Replicas:
    """`count` actors made by `start()`, equal, each with the methods `search` and `status`."""

    def __init__(self, name: str, start: Callable[[], Any], count: int, timeout_s: float) -> None:
        self._name = name
        self._start = start
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._turns = itertools.count()
        self._closed = False
        self._reason = "none has started yet"
        self._actors = [start() for _ in range(count)]
        self._coming = {i: self._probe(i) for i in range(count)}

    def wait(self) -> None:
        """Until all actors are up. Raises UserError where one fails to start or does not come in time."""
        deadline = time.monotonic() + self._timeout_s
        for coming in self._coming.values():
            try:
                ray.get(coming.status, timeout=max(0.0, deadline - time.monotonic()))
            except RayError as error:
                raise self._unreachable(_brief(error)) from error

    def send(self, *question: Any) -> Flight:
        """Ask the next actor that is up, waiting where none is. Raises UserError after the timeout."""
        actor = self._next()
        return Flight(actor, actor.search.remote(*question), question)

    def receive(self, flight: Flight) -> Any:
        """The answer, from another actor where this one was lost. Raises the UserError of the search."""
        for _ in range(MAX_LOSSES):
            try:
                return ray.get(flight.answer)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError) else error from None
            except LOST_ACTOR as error:
                self._lose(flight.actor, error)
            flight = self.send(*flight.question)
        raise UserError(
            f"{self._name}: the same queries lost {MAX_LOSSES} actors; the last time: {self._reason}. "
            "Too little memory is the usual cause: spread the database over more actors, see Ray's logs."
        )

    def status(self) -> list[Any]:
        """The status of every actor that is up."""
        found = []
        for actor in self._up():
            try:
                found.append(ray.get(actor.status.remote()))
            except LOST_ACTOR as error:
                self._lose(actor, error)
        return found

    def close(self) -> None:
        """End all actors; questions under way end with UserError."""
        with self._lock:
            self._closed = True
            for actor in self._actors:
                ray.kill(actor)

    def _next(self) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while not (up := self._up()):
            if time.monotonic() > deadline:
                raise self._unreachable(self._reason)
            time.sleep(POLL_S)
        return up[next(self._turns) % len(up)]

    def _up(self) -> list[Any]:
        with self._lock:
            if self._closed:
                raise UserError(f"{self._name}: the cluster is closed. Open it again.")
            for i, coming in list(self._coming.items()):
                if ray.wait([coming.status], timeout=0)[0]:
                    self._look(i, coming)
            return [actor for i, actor in enumerate(self._actors) if i not in self._coming]

    def _look(self, i: int, coming: _Coming) -> None:
        try:
            ray.get(coming.status)
        except RayError as error:
            if time.monotonic() - coming.started > PAUSE_S:
                self._revive(i, error)
            return
        del self._coming[i]

    def _lose(self, actor: Any, error: RayError) -> None:
        with self._lock:
            for i, held in enumerate(self._actors):
                if held is not actor or i in self._coming or self._closed:
                    continue
                LOG.warning("%s: an actor was lost (%s), another is started", self._name, _brief(error))
                self._revive(i, error)

    def _revive(self, i: int, error: RayError) -> None:
        """Replace an actor that is dead; one that only cannot be reached is asked for its status again."""
        self._reason = _brief(error)
        if isinstance(error, ActorDiedError):
            self._actors[i] = self._start()
        self._coming[i] = self._probe(i)

    def _probe(self, i: int) -> _Coming:
        return _Coming(time.monotonic(), self._actors[i].status.remote())

    def _unreachable(self, reason: str) -> UserError:
        return UserError(
            f"{self._name}: no actor can be reached: {reason}. Mend that (Ray's logs tell more; the cluster "
            f"may lack free CPUs or memory), or raise restart_timeout_s, now {self._timeout_s:g}."
        )


def _brief(error: RayError) -> str:
    """The last line of Ray's text, shortened; where an actor raised on its start, that is its exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {textwrap.shorten(lines[-1] if lines else '', 240)}"
