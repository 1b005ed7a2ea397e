"""Identical Ray actors that share the calls. A failed actor is restarted while the others go on."""

import itertools
import logging
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions
from ray.exceptions import RayError

from retrieval.errors import UserError

LOG = logging.getLogger("cluster")

LOST_ACTOR = (
    exceptions.RayActorError,
    exceptions.OutOfMemoryError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
)
MAX_LOSSES = 5
"""Actor failures during one call after which the call itself counts as their cause."""
RESTART_PAUSE_S = 0.5
"""Shortest time in seconds between two starts of an actor that fails to start."""
POLL_S = 0.02
"""Seconds between two checks of the starting actors while none is running."""


@dataclass(frozen=True)
class PendingCall:
    """A call of a method: the actor, the reference of the result, name of the method, and the arguments."""

    actor: Any
    result: Any
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _StartingActor:
    """A starting actor: the time of its start, and the reference of its first status."""

    started: float
    status: Any


class Replicas:
    """`count` identical actors created by `start()`, with a method `status` and others."""

    def __init__(self, name: str, start: Callable[[], Any], count: int, timeout_s: float) -> None:
        self._name = name
        self._start = start
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._num_calls = itertools.count()
        self._closed = False
        self._last_failure = "none has started yet"
        self._actors = [start() for _ in range(count)]
        self._starting = {i: self._starting_actor(i) for i in range(count)}

    def wait(self) -> None:
        """Wait until all actors run. Raises UserError if one fails to start or exceeds the timeout."""
        deadline = time.monotonic() + self._timeout_s
        for starting in self._starting.values():
            try:
                ray.get(starting.status, timeout=max(0.0, deadline - time.monotonic()))
            except RayError as error:
                raise self._unreachable(_brief(error)) from error

    def send(self, method: str, *arguments: Any) -> PendingCall:
        """Call a method of the next running actor. Raises UserError if none runs before the timeout."""
        actor = self._next()
        return PendingCall(actor, getattr(actor, method).remote(*arguments), method, arguments)

    def receive(self, call: PendingCall) -> Any:
        """The result of a call; repeats it on another actor if this one failed. Raises its UserError."""
        for _ in range(MAX_LOSSES):
            try:
                return ray.get(call.result)
            except exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, UserError) else error from None
            except LOST_ACTOR as error:
                self._replace(call.actor, error)
            call = self.send(call.method, *call.arguments)
        raise UserError(
            f"{self._name}: {MAX_LOSSES} actors failed on the same queries; the last failure: "
            f"{self._last_failure}. The usual cause is too little memory: use more actors, see Ray's logs."
        )

    def status(self) -> list[Any]:
        """The status of every running actor."""
        statuses = []
        for actor in self._running():
            try:
                statuses.append(ray.get(actor.status.remote()))
            except LOST_ACTOR as error:
                self._replace(actor, error)
        return statuses

    def close(self) -> None:
        """Stop all actors. Pending calls raise UserError."""
        with self._lock:
            self._closed = True
            for actor in self._actors:
                ray.kill(actor)

    def _next(self) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while not (running := self._running()):
            if time.monotonic() > deadline:
                raise self._unreachable(self._last_failure)
            time.sleep(POLL_S)
        return running[next(self._num_calls) % len(running)]

    def _running(self) -> list[Any]:
        with self._lock:
            if self._closed:
                raise UserError(f"{self._name}: the cluster is closed. Open it again.")
            for i, starting in list(self._starting.items()):
                if ray.wait([starting.status], timeout=0)[0]:
                    self._check_started(i, starting)
            return [actor for i, actor in enumerate(self._actors) if i not in self._starting]

    def _check_started(self, i: int, starting: _StartingActor) -> None:
        try:
            ray.get(starting.status)
        except RayError as error:
            if time.monotonic() - starting.started > RESTART_PAUSE_S:
                self._restart(i, error)
            return
        del self._starting[i]

    def _replace(self, actor: Any, error: RayError) -> None:
        with self._lock:
            for i, current in enumerate(self._actors):
                if current is not actor or i in self._starting or self._closed:
                    continue
                LOG.warning("%s: an actor failed (%s); starting another", self._name, _brief(error))
                self._restart(i, error)

    def _restart(self, i: int, error: RayError) -> None:
        """Start a new actor if this one died. If it is only unreachable, request its status again."""
        self._last_failure = _brief(error)
        if isinstance(error, exceptions.ActorDiedError):
            self._actors[i] = self._start()
        self._starting[i] = self._starting_actor(i)

    def _starting_actor(self, i: int) -> _StartingActor:
        return _StartingActor(time.monotonic(), self._actors[i].status.remote())

    def _unreachable(self, reason: str) -> UserError:
        return UserError(
            f"{self._name}: no actor can be reached: {reason}. See Ray's logs; the cluster may lack "
            f"free CPUs or memory. A restart may take restart_timeout_s, now {self._timeout_s:g}."
        )


def _brief(error: RayError) -> str:
    """Type and last line of an error of Ray. If an actor failed to start, that line is its exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {textwrap.shorten(lines[-1] if lines else '', 240)}"
