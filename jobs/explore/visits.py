"""Requests whose visitor has left are cancelled, so that they do not keep others waiting."""

import asyncio
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

Result = TypeVar("Result")

CLIENT_CLOSED_REQUEST = 499
"""HTTP status, for the metrics only: nobody receives the response."""
POLL_S = 0.25


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client disconnects. The body must have been read before.

    Raises HTTPException 499 if the client disconnected.
    """
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=POLL_S))[0]:
            if await request.is_disconnected():
                raise HTTPException(CLIENT_CLOSED_REQUEST)
        return task.result()
    finally:
        task.cancel()


class Visits:
    """The running work of each visit to the page. A visit is one loading of the page in one tab of a browser."""

    def __init__(self) -> None:
        self._tasks: defaultdict[str, set[asyncio.Task[Any]]] = defaultdict(set)

    async def run(self, visit: str, work: Coroutine[Any, Any, Result], otherwise: Result) -> Result:
        """The result of `work`, or `otherwise` if the visit ended before."""
        task = asyncio.create_task(work)
        self._tasks[visit].add(task)
        try:
            await asyncio.wait({task})
            return otherwise if task.cancelled() else task.result()
        finally:
            task.cancel()
            self._tasks[visit].discard(task)
            if not self._tasks[visit]:
                del self._tasks[visit]

    def end(self, visit: str) -> None:
        """Cancel the work of a visit."""
        for task in self._tasks.get(visit, ()):
            task.cancel()
