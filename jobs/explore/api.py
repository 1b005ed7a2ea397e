"""The HTTP API: /search, /sample, /attribution, /verify, /databases, /picture, /made, /health, /metrics, /openapi.json.

Every error is JSON with a `detail` text: 400 for a request that cannot be run, 401 without the token, 403 for a
request from another site, 413 for a body above the limit, 422 for an invalid field, 429, 503 and 504 when the server
is overloaded, 503 when its object store does not respond. URLs in responses are relative to that of the page. `note` is
a sentence for a text of which CLIP reads only the start, and else empty.
"""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest

from jobs.explore.api_models import ErrorResponse, SampleRequest, SearchRequest, VerifyRequest, first_problem
from jobs.explore.explorer import Explorer
from jobs.explore.guard import Guard
from jobs.explore.png_cache import PngCache
from jobs.explore.visits import while_connected
from jobs.explore.work_queue import BusyError, WorkQueue
from retrieval.errors import NodeError, UserError


def make_api(explorer: Explorer, cache: PngCache, hosts: list[str], token: str) -> FastAPI:
    """The application. hosts: accepted values of the Host header; token: none is required if empty."""
    registry = CollectorRegistry()
    for queue in explorer.queues:
        _count_pending(queue, registry)
    waiting = Gauge("explore_search_turns", "Requests of GET /search running and waiting.", registry=registry)
    waiting.set_function(explorer.turns.__len__)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        explorer.close()

    # The Swagger and ReDoc pages load scripts from other servers; only their description is served.
    invalid: dict[int | str, Any] = {422: {"model": ErrorResponse, "description": "A field is invalid."}}
    app = FastAPI(title="laion-rdm explore", docs_url=None, redoc_url=None, lifespan=lifespan, responses=invalid)
    app.add_exception_handler(RequestValidationError, _invalid_field)
    app.add_exception_handler(UserError, _error_response)
    app.add_exception_handler(BusyError, _error_response)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(Guard, token=token, limits=explorer.limits, turns=explorer.turns, registry=registry)
    _add_status_routes(app, explorer, registry)
    _add_picture_routes(app, explorer, cache)
    _add_search_and_sample(app, explorer)
    _add_origin_routes(app, explorer)
    return app


def _add_status_routes(app: FastAPI, explorer: Explorer, registry: CollectorRegistry) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Answers as soon as the server accepts requests."""
        return {"status": "ok", "databases": len(explorer.databases), "samples": explorer.sampler is not None}

    @app.get("/databases")
    async def databases() -> dict[str, Any]:
        """The databases by name, and the limits of requests."""
        rows = [
            {
                "name": name,
                "rows": len(database),
                "encoder": database.encoder.model,
                "pictures": explorer.pictures.count(name),
            }
            for name, database in explorer.databases.items()
        ]
        return {"databases": rows, "limits": explorer.limits.model_dump()}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts, times and queue lengths, for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _add_picture_routes(app: FastAPI, explorer: Explorer, cache: PngCache) -> None:
    @app.get("/picture/{database}/{image_id}", response_class=Response)
    async def picture(database: str, image_id: int) -> Response:
        """The thumbnail of a database row, as JPEG."""
        data = await explorer.thumbnail(database, image_id)
        if data is None:
            raise HTTPException(404, "This server has no picture of this row, or its file was deleted.")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    @app.get("/made/{key}.png", response_class=Response)
    async def sampled_picture(key: str) -> Response:
        """A recent sample as PNG; the file stores its full recipe."""
        if (data := cache.get(key)) is None:
            raise HTTPException(404, "This picture is no longer in memory. Open its link to make it again.")
        return Response(data, media_type="image/png")


def _add_search_and_sample(app: FastAPI, explorer: Explorer) -> None:
    @app.get("/search")
    async def search(connection: HttpRequest, request: Annotated[SearchRequest, Query()]) -> JSONResponse:
        """The neighbors of a text."""
        return await search_post(connection, request)

    @app.post("/search")
    async def search_post(connection: HttpRequest, request: SearchRequest) -> JSONResponse:
        """The neighbors of a text, a picture, or both together."""
        neighbors = await while_connected(connection, explorer.search(request))
        # Neither `asdict` nor FastAPI's encoder: each takes longer than the search.
        rows = [vars(neighbor) for neighbor in neighbors]
        return JSONResponse({"neighbors": rows, "note": explorer.note(request.text)})

    @app.get("/sample", response_class=Response)
    async def sample(connection: HttpRequest, request: Annotated[SampleRequest, Query()]) -> Response:
        """A picture as PNG; the file stores its full recipe."""
        (picture,) = await while_connected(connection, explorer.sample([request]))
        return Response(picture.png, media_type="image/png")

    @app.post("/sample")
    async def sample_post(connection: HttpRequest, request: SampleRequest) -> dict[str, Any]:
        """A picture, its neighbors, its recipe, and a link to the page that makes it again."""
        (picture,) = await while_connected(connection, explorer.sample([request]))
        return {
            "png": base64.b64encode(picture.png).decode(),
            "recipe": picture.sample.recipe(),
            "neighbors": [asdict(neighbor) for neighbor in explorer.neighbors(picture.sample)],
            "link": request.link(picture.sample),
            "note": explorer.note(request.prompt),
        }


def _add_origin_routes(app: FastAPI, explorer: Explorer) -> None:
    @app.post("/attribution")
    async def attribution(connection: HttpRequest, request: SampleRequest) -> dict[str, Any]:
        """A picture with and without the rows that meet `without`, how far the two differ, and the neighbors of one
        of them only."""
        pair = await while_connected(connection, explorer.attribute(request))
        return {
            "png": base64.b64encode(pair.with_group.png).decode(),
            "png_without": base64.b64encode(pair.without_group.png).decode(),
            "clip_similarity": pair.attribution.clip_similarity,
            "pixel_difference": pair.attribution.pixel_difference,
            "removed": [asdict(neighbor) for neighbor in explorer.views(pair.attribution.removed)],
            "added": [asdict(neighbor) for neighbor in explorer.views(pair.attribution.added)],
            "note": explorer.note(request.prompt),
        }

    @app.post("/verify")
    async def verify(connection: HttpRequest, request: VerifyRequest) -> dict[str, Any]:
        """The signed statement (C2PA) in a picture: signer, whether it is unchanged, digests and neighbors."""
        signed = await while_connected(connection, explorer.verify(request))
        if signed is None:
            raise HTTPException(404, "This picture has no signed statement.")
        # Ids of 64 bits as text, because JavaScript would round them.
        neighbors = [{**neighbor, "image_id": str(neighbor["image_id"])} for neighbor in signed.neighbors]
        return {**asdict(signed), "neighbors": neighbors}


def _count_pending(queue: WorkQueue, registry: CollectorRegistry) -> None:
    gauge = Gauge(f"explore_{queue.name}_pending", "Jobs running and waiting.", registry=registry)
    gauge.set_function(queue.__len__)


async def _invalid_field(request: HttpRequest, error: Exception) -> JSONResponse:
    # FastAPI's own handler returns all values, which may be as long as the request or no JSON (nan).
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": first_problem(error.errors())}, 422)


async def _error_response(request: HttpRequest, error: Exception) -> JSONResponse:
    status = error.status if isinstance(error, BusyError) else 503 if isinstance(error, NodeError) else 400
    headers = {"Retry-After": "5"} if status in (429, 503) else None
    return JSONResponse({"detail": str(error)}, status, headers)
