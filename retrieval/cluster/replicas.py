"""Identical Ray actors that share the calls. Failed actors are restarted while the others answer.

A call without an answer is repeated on another actor, and the first answer counts.
"""

import itertools
import logging
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
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
class CallLimits:
    """Seconds: for the start of an actor's process; for a call before it is repeated on another actor; for a call."""

    start_s: float
    repeat_s: float
    call_s: float


@dataclass(frozen=True)
class _StartingActor:
    """A starting actor: the time of its start, and references that are ready when its process runs and when it has
    opened its files, which may take long."""

    started: float
    process: Any
    status: Any

    def is_opening(self) -> bool:
        """Whether the process runs and opens its files."""
        if not ray.wait([self.process], timeout=0)[0] or ray.wait([self.status], timeout=0)[0]:
            return False
        with suppress(RayError):
            ray.get(self.process)
            return True
        return False


class Replicas:
    """`count` identical actors created by `start()`, with the methods `pid`, `status` and others."""

    def __init__(self, name: str, start: Callable[[], Any], count: int, limits: CallLimits) -> None:
        self._name = name
        self._start = start
        self._limits = limits
        self._lock = threading.Lock()
        self._num_calls = itertools.count()
        self._closed = False
        self._last_failure = "none has started yet"
        self._actors = [start() for _ in range(count)]
        self._starting = {i: self._starting_actor(i) for i in range(count)}

    def wait(self) -> None:
        """Wait until all actors run. Raises UserError if one fails to start, or if its process starts too late."""
        deadline = time.monotonic() + self._limits.start_s
        for starting in self._starting.values():
            try:
                ray.get(starting.process, timeout=max(0.0, deadline - time.monotonic()))
                ray.get(starting.status)
            except RayError as error:
                raise self._unreachable(_brief(error)) from error

    def send(self, method: str, *arguments: Any) -> PendingCall:
        """Call a method of the next running actor. Raises UserError if none runs before the timeout."""
        return _call(self._next(), method, arguments)

    def receive(self, call: PendingCall) -> Any:
        """The result of a call; repeats it on another actor if this one failed or is late. Raises its UserError."""
        for _ in range(MAX_LOSSES):
            call = self._first_answered(call)
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

    def _first_answered(self, call: PendingCall) -> PendingCall:
        """The call, or its repetition on another actor if that answers first. Raises UserError without an answer."""
        calls, limits = [call], self._limits
        if len(self._actors) > 1 and not ray.wait([call.result], timeout=limits.repeat_s)[0]:
            others = [actor for actor in self._running() if actor is not call.actor]
            calls += [_call(actor, call.method, call.arguments) for actor in others[:1]]
        by_result = {each.result: each for each in calls}
        answered, _ = ray.wait([*by_result], timeout=limits.call_s)
        if not answered:
            raise UserError(
                f"{self._name}: no answer to {call.method} within {limits.call_s:g} s. Look at Ray's logs, or raise "
                "call_timeout_s."
            )
        return by_result[answered[0]]

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
        deadline = time.monotonic() + self._limits.start_s
        while not (running := self._running()):
            if time.monotonic() > deadline and not any(each.is_opening() for each in list(self._starting.values())):
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
        actor = self._actors[i]
        return _StartingActor(time.monotonic(), actor.pid.remote(), actor.status.remote())

    def _unreachable(self, reason: str) -> UserError:
        return UserError(
            f"{self._name}: no actor can be reached: {reason}. See Ray's logs; the cluster may lack "
            f"free CPUs or memory. A restart may take restart_timeout_s, now {self._limits.start_s:g}."
        )


def _call(actor: Any, method: str, arguments: tuple[Any, ...]) -> PendingCall:
    return PendingCall(actor, getattr(actor, method).remote(*arguments), method, arguments)


def _brief(error: RayError) -> str:
    """Type and last line of an error of Ray. If an actor failed to start, that line is its exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {textwrap.shorten(lines[-1] if lines else '', 240)}"
