"""The HTTP API: /search, /sample, /databases, /picture, /made, /health, /metrics, /openapi.json.

Takes an Explorer, gives a FastAPI application. Every refusal is JSON with a `detail` for people: 400 for a
mistake, 401 without the token, 413 for too large a body, 422 for a field that is none, 429, 503 and 504 for
too much work.
"""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as Asked

from jobs.explore.api_models import SampleAsk, SearchAsk
from jobs.explore.explorer import Explorer
from jobs.explore.guard import Guard
from jobs.explore.png_cache import Made
from jobs.explore.work_queue import Refused, Turns
from retrieval.errors import UserError

Searching = Annotated[SearchAsk, Query()]
Sampling = Annotated[SampleAsk, Query()]


def make_api(explorer: Explorer, made: Made, hosts: list[str], token: str) -> FastAPI:
    """The application. hosts: names that visitors may call this server by; token: none is asked if empty."""
    registry = CollectorRegistry()
    for turns in (explorer.searches, explorer.samples):
        _watch(turns, registry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        explorer.close()

    # swagger's page comes from elsewhere, so there is its description alone
    app = FastAPI(title="laion-rdm explore", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(UserError, _told)
    app.add_exception_handler(Refused, _told)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    limit = explorer.limits.max_body_bytes
    app.add_middleware(Guard, token=token, max_body_bytes=limit, registry=registry)
    _add_looking(app, explorer, made, registry)
    _add_asking(app, explorer)
    return app


def _add_looking(app: FastAPI, explorer: Explorer, made: Made, registry: CollectorRegistry) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Answers as soon as requests are served."""
        return {"status": "ok", "databases": len(explorer.databases), "samples": explorer.sampler is not None}

    @app.get("/databases")
    async def databases() -> dict[str, Any]:
        """The databases by name, and what may be asked of them."""
        rows = [
            {
                "name": name,
                "rows": len(one),
                "encoder": one.encoder.model,
                "pictures": explorer.pictures.count(name),
            }
            for name, one in explorer.databases.items()
        ]
        return {"databases": rows, "limits": explorer.limits.model_dump()}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts, times and queues, for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/picture/{database}/{image_id}", response_class=Response)
    async def picture(database: str, image_id: int) -> Response:
        """A database row's picture, small, as JPEG."""
        data = await run_in_threadpool(explorer.pictures.thumbnail, database, image_id)
        if data is None:
            raise HTTPException(404, "This picture is not at hand.")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    @app.get("/made/{key}.png", response_class=Response)
    async def made_picture(key: str) -> Response:
        """A picture that was made a little while ago, as PNG with its recipe inside."""
        if (data := made.png(key)) is None:
            raise HTTPException(404, "This picture is forgotten. Make it again: its link still says how.")
        return Response(data, media_type="image/png")


def _add_asking(app: FastAPI, explorer: Explorer) -> None:
    async def searched(ask: SearchAsk) -> dict[str, Any]:
        return {"neighbors": [asdict(one) for one in await explorer.search(ask)]}

    @app.get("/search")
    async def search(ask: Searching) -> dict[str, Any]:
        """The neighbors of a text."""
        return await searched(ask)

    @app.post("/search")
    async def search_post(ask: SearchAsk) -> dict[str, Any]:
        """The neighbors of a text, a picture, or both together."""
        return await searched(ask)

    @app.get("/sample", response_class=Response)
    async def sample(ask: Sampling) -> Response:
        """A picture, as PNG with its recipe inside."""
        (one,) = await explorer.sample([ask])
        return Response(one.png, media_type="image/png")

    @app.post("/sample")
    async def sample_post(ask: SampleAsk) -> dict[str, Any]:
        """A picture with the neighbors that made it, its recipe, and the page's link that makes it again."""
        (one,) = await explorer.sample([ask])
        return {
            "png": base64.b64encode(one.png).decode(),
            "recipe": one.sample.recipe(),
            "neighbors": [asdict(found) for found in explorer.neighbors(one.sample)],
            "link": ask.link(one.sample),
        }


def _watch(turns: Turns, registry: CollectorRegistry) -> None:
    gauge = Gauge(f"explore_{turns.name}_pending", "Under way and waiting.", registry=registry)
    gauge.set_function(turns.__len__)


async def _told(request: Asked, error: Exception) -> JSONResponse:
    status = error.status if isinstance(error, Refused) else 400
    headers = {"Retry-After": "5"} if status in (429, 503) else None
    return JSONResponse({"detail": str(error)}, status, headers)
